"""Answers from a server that speaks OpenAI's HTTP API."""
