"""Answers that are checked when they are complete, and tried again where they were wrong."""
