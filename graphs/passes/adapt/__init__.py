"""What adapters need that are kept apart from the weights."""
