"""Where every byte goes. Knows no tokens and no attention."""
