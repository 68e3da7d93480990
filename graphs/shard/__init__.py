"""Cuts the graphs of a bundle into those of several ranks."""
