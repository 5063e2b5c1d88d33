"""Texts to vectors, inside a memory plan."""
