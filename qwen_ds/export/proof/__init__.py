"""The proof of a merge: logits of both sides, and how far they may differ."""
