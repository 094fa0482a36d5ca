"""How files are read and written: complete or absent, and nothing on trust."""
