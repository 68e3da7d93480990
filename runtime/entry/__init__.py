"""Compiles causal language models into ONNX bundles and runs them. setup.py installs this folder as `satchel`."""
