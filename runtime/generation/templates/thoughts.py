"""The marks around the reasoning of models. Standard library only."""

from __future__ import annotations

THOUGHTS: tuple[tuple[str, str], ...] = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),  # Mistral
    ("<|channel>thought", "<channel|>"),  # Gemma 4
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A
    ("<seed:think>", "</seed:think>"),
)
"""What begins and ends reasoning; a template shows the name in a mark such as `<|channel>`."""

CHANNELS = ("<|channel|>", "<|message|>")
"""What the template of a model has that answers in channels, as gpt-oss does."""
FINAL = "<|channel|>final<|message|>"
"""What begins the answer in the last of the channels."""
THOUGHT_MESSAGE, THOUGHT_END = "<|channel|>analysis<|message|>", "<|end|>"
"""What begins a message of reasoning, and ends it."""
MESSAGE_START = "<|start|>"
NEXT_MESSAGE = "<|end|><|start|>assistant"
"""What ends a message and begins another one."""


def thoughts_of(template: str) -> dict[str, str]:
    """What begins reasoning, and what ends it, as far as a chat template shows; `<think>` may always."""
    return {begin: end for begin, end in THOUGHTS if begin == "<think>" or begin in template}
