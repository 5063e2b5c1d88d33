"""What each inference engine brings of its own: planning, repacking, loading."""
