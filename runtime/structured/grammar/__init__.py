"""Constraints that llguidance computes, and what is known of the ends of their answers."""
