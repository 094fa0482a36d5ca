"""The model itself, without training: configuration, modeling, tokenizer, ChatML, checkpoint folders, adapters."""
