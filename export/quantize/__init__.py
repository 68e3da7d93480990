"""Turns a float graph into quantized weights: calibration, rounding, and the search for sensitive layers."""
