"""Where the time of prefill and decode goes, from ONNX Runtime's profiler."""
