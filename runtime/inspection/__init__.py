"""Shows what is in a bundle without running it."""
