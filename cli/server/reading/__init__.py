"""Reads requests: their bodies, and the fields that several protocols have."""
