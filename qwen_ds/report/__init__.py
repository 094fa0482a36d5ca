"""Reports of runs as pages, made from the files of a run folder alone."""
