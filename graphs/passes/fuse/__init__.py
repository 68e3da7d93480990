"""Passes that replace groups of nodes by fused operators, and join linear layers over the same input."""
