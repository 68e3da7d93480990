"""Which passes run for which target, and in which order."""
