"""Passes for the head: which tokens get logits, and how it shares its weight with the embedding."""
