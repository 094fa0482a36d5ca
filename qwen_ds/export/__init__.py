"""Outputs for other tools: merged checkpoints, with proof."""
