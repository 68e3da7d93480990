"""Traces a PyTorch model into an ONNX graph whose weights stay in the checkpoint."""
