"""Runs a model inside its memory plan: load, decode, sample, profile."""
