"""Metrics, trackers, progress, profile, evaluation, and the page of a finished run."""
