"""DeltaLLM: similar keys are merged, so that decoding reads fewer of them."""
