"""The bundle: a folder with a manifest, ONNX graphs, engines and reports, every file hashed."""
