"""The HTTP API: a front that clients talk to, and engines in processes of their own."""
