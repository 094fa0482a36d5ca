"""From files to batches: source rows, checked conversations, token rows on disk, micro-batches."""
