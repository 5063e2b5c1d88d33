"""Answers that begin with free text, the reasoning, before what must follow a format."""
