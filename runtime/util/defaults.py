"""Defaults that the command line and the Python interface share. Standard library only."""

from __future__ import annotations

PROVIDER = "cpu"
MAX_NEW_TOKENS = 128
BATCH_ROWS = 8
PREFIX_MIB = 256
"""Memory for the keys and values of what a generator has seen."""
