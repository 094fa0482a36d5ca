"""Files to checked conversations."""
