"""Bilinear resize, GroupNorm, ReLU and a shift for each channel, in one pass over the output."""
