"""Export of the split graphs to ONNX."""

DEFAULT_OPSET = 21
"""The first opset with a native GroupNormalization; 23 adds Attention, which not every engine takes."""
BF16_OPSET = 22
"""The first opset whose convolutions take bfloat16."""
OPSETS = (18, 19, 20, 21, 22, 23)
DTYPE_NAMES = ("fp32", "fp16", "bf16")
