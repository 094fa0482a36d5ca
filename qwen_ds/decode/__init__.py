"""Decoding with any causal language model: sampling, stopping, text and batches, row by row."""
