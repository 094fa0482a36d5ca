"""Reading and writing of files: complete or absent, and nothing on trust."""
