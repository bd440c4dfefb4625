"""The whole model on some tokens, with one layer's FFN in memory at a time."""
