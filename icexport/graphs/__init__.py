"""What a model is split into: graphs, their sizes, and the split."""
