"""Export of the split graphs to ONNX."""

DEFAULT_OPSET = 21
"""The first opset with a native GroupNormalization; 23 adds Attention, which not every engine takes."""
OPSETS = (18, 19, 20, 21, 22, 23)
