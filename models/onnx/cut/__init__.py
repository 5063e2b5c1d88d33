"""Cuts a decoder's graph at its attention nodes into pieces that run as sessions of their own."""
