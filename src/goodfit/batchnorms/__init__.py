"""What the batch norms of a model need: new statistics, to be held still, another kind of norm."""
