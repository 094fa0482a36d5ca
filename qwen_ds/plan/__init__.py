"""The plan: how a recipe will run and whether it fits, predicted without loading a model."""
