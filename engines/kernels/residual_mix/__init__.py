"""The end of one tap's way through the probe: both GroupNorms, the sum, ReLU, and the weighted sum over taps."""
