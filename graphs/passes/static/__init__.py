"""Passes that make graphs of static shapes."""
