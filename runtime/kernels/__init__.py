"""satchel's own operators for ONNX Runtime's CPU provider, in C, and where their library is."""
