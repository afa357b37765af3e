"""`gf.fit`: the training that goodfit does itself, from batches to the best weights."""
