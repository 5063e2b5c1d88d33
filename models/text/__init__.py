"""Texts to tokens and back: what a tokenizer is, and prompts in which only the template writes control tokens."""
