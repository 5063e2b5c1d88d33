"""Paired benchmarks: two configurations in turn, in processes of their own."""
