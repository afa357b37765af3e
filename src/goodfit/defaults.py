"""What the main job takes where nothing is said."""

COCKTAIL = "BatchNorm(), Dropout(0.2), WeightDecay(1e-2), EarlyStopping(30)"
WIDTH, DEPTH = 256, 2
