"""From files to batches: rows of any known shape, checked conversations, token rows on disk, right-padded batches."""
