"""The request: the options of a run, and the parser of every command line."""
