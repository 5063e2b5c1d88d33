"""What proposes the next tokens, cheaply, for the model to verify. One draft, one file."""
