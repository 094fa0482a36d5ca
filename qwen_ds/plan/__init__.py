"""What will run, and whether it fits: memory, time and traffic, predicted without loading a
model."""
