"""Where time and memory go: spans, resident memory, reports."""
