"""Passes that bring the tracer's graph into one form, and clean up at the end."""
