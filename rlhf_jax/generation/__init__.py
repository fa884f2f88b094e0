"""Texts in, texts out: a model with its tokenizer."""
