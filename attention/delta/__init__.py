"""DeltaLLM's attention: of the keys behind a window, what is like another key is not computed again."""
