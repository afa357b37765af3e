"""What the batch norms of a model need: new statistics, and to be held still."""
