"""Training data: where pictures and captions come from."""
