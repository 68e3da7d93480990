"""Measures how fast a bundle runs and what memory it takes."""
