"""Turns a float graph into quantised weights: calibration, rounding, and the search for sensitive layers."""
