"""Compares a policy with dense attention: KL divergence, passkeys, questions."""
