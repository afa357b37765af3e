"""Members of many cocktails, trained together."""
