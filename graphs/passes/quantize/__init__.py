"""Passes that prepare weights for quantization, and that put quantized weights into a graph."""
