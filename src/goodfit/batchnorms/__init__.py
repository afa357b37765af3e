"""What the batch norms of a model need: new statistics, to be held still, and to go at the end."""
