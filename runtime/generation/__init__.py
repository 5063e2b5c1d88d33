"""From messages to tokens and back: chat template, decode loop, sampling, statistics."""
