"""GemFilter: an early layer chooses which prompt tokens the other layers read."""
