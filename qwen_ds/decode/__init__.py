"""Decoding: sampling, stops, text and batches of any causal language model, row by row."""
