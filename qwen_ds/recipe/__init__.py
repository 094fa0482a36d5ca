"""What was asked: the options of a run, and the parser of every command line."""
