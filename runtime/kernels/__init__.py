"""satchel's own operators for ONNX Runtime, in C, and where the built library of them is."""
