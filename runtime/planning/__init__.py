"""From what the user asked to a memory plan, before any weight is loaded."""
