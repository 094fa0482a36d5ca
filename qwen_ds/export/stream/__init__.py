"""Weights as a stream of row blocks, read, changed and written side by side."""
