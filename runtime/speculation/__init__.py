"""Speculative decoding: drafts, verification, and when it pays."""
