"""Several prompts generated together, one forward pass for all."""
