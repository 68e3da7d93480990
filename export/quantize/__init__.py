"""Quantizes the weights of a float graph: calibration, rounding, and the search for sensitive layers."""
