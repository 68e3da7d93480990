"""What chat templates are rendered with."""

from __future__ import annotations

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
TURNS = [
    {"role": "user", "content": "  What is <b>2 + 2</b> & why?\n"},
    {"role": "assistant", "content": "It is 4.\n\nMore: 二たす二"},
    {"role": "user", "content": "Merci \U0001f642 </s>"},
]
