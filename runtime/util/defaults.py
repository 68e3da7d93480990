"""Defaults that the command line and the Python API share. Standard library only."""

from __future__ import annotations

PROVIDER = "cpu"
MAX_NEW_TOKENS = 128
CHAT_MAX_NEW_TOKENS = 1024
"""For answers in a chat template, which end by themselves: this stops one that does not."""
CHAT_MAX_REPEATS = 8
"""How often an answer in a chat template may repeat a block of tokens in a row."""
SPECULATE = "auto"
"""Drafts come from texts that were seen, and from a smaller model if one is given."""
BATCH_ROWS = 8
STRETCH = 3.0
"""How many times as long as usual a running request may wait for its next token while prompts of others are fed."""
PREFIX_CACHE_MIB = 256
"""Size of the prefix cache: keys and values of prompts and answers that a generator has seen."""
