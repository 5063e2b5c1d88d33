"""Files: what one is, where lowtide's own lie, how one is written whole, and its fingerprint."""
