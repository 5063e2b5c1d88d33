"""Saved chats: the messages and the KV cache in one file."""
