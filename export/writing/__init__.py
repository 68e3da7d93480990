"""Writes a bundle: its graphs, weights, manifest and certificate, published whole or not at all."""
