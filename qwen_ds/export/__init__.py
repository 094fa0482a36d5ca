"""What leaves the project: merged checkpoints, with proof."""
