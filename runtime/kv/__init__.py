"""What the KV cache holds: sessions, the prefix cache, filtered prompts."""
