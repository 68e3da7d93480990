"""Passes that replace linear layers and attention by satchel's own operators."""
