"""Pages for a browser: one self-contained file each, without a script and without a request."""
