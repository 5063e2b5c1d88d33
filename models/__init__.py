"""What a model is, and one forward pass of it."""
