"""DeepSpeed, and nothing else of it anywhere else."""
