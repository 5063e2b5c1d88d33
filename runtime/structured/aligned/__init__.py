"""Answers distributed as the model's among those that follow a constraint: rates of prefixes, and particles."""
