"""Evaluation: how much an approximate attention policy changes a model's answers."""
