"""The HTTP server of `lowtide serve`: OpenAI's and ollama's protocols over `lowtide.runtime.serving`."""
