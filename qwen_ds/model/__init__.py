"""The model, without training: family, configuration, modeling, tokenizer, chat, adapters."""
