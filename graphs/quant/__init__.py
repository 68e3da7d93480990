"""Quantization as data: recipes, rounding, quantized weights, and which rule each weight follows."""
