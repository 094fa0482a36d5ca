"""The proof of a merge: logits of both sides, and the bounds of their difference."""
