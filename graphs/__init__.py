"""Turns the traced graph of a model into the graphs of a bundle: passes, and which of them run for which target."""
