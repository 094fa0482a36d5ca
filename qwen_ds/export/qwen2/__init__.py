"""The Qwen2 format: names, settings and tokenizer, both ways."""
