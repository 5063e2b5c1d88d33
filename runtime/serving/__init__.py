"""Models that answer many requests: which are loaded, who waits, and what an answer is made of."""
