"""What a bundle must pass."""
