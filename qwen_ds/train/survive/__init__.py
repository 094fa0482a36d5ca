"""Checkpoints, resuming, the watchdog, and requests to stop."""
