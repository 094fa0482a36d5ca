"""The model itself, without training: family, configuration, modeling, tokenizer, chat,
adapters."""
