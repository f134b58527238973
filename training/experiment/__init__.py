"""What the alignment loss buys, measured: arms of equal budget from one under-trained ControlNet."""
