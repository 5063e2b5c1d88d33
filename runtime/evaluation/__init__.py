"""Measures how much an approximate attention policy changes the answers."""
