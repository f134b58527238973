"""Forms of a graph that suit one backend better than the plain ONNX of a bundle."""
