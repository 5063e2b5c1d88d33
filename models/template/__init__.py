"""Chat templates: a sandbox with limits, in which the origin of every character is traced."""
