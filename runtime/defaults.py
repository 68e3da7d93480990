"""Defaults that the command line and the Python interface share. Standard library only."""

from __future__ import annotations

PROVIDER = "cpu"
MAX_NEW_TOKENS = 128
