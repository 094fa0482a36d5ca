"""Conversations to token rows, cached on disk."""
