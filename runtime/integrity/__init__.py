"""What is checked before a bundle is believed: its digest, its signature, its names and sizes, what graphs point at."""
