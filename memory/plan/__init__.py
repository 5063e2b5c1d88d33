"""The memory plan: one line per component, computed before anything is loaded."""
