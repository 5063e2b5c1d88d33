"""Structured output measured over a file of JSON schemas, beside free decoding and other grammar engines."""
