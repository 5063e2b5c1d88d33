"""Engines that are timed side by side, each in a process of its own."""
