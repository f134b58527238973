"""1x1 convolution of a tap: the probe's first convolution and its shortcut as one matrix product."""
