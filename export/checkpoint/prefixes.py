"""Takes off prefixes that tools leave in the names of tensors, where the names then fit the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping

from satchel.graphs.ir.weights import LazyWeight

_ANYWHERE = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_layer.")
"""torch.compile, FSDP, activation checkpointing and PEFT wrap single modules as well as whole models."""

_LEADING = {
    "base_model.model.": "", "module.": "", "_forward_module.": "", "model.language_model.": "model.",
    "language_model.": "", "model.text_model.": "model.", "text_model.": "", "model.": "",
}  # fmt: skip
"""What names begin with after DataParallel, PEFT, multimodal models and training loops, and what it stands for."""


def without_prefixes(
    stored: Mapping[str, LazyWeight], fitting: Callable[[Iterable[str]], int]
) -> tuple[dict[str, LazyWeight], tuple[str, ...]]:
    """Return the tensors by the names that fit the model best, and the prefixes that were taken off.

    Args:
        stored: By their names in the file.
        fitting: Counts the weights of the model that names fill.
    """
    names, best = list(stored), fitting(stored)
    taken: tuple[str, ...] = ()
    while better := _best(names, best, fitting):
        names, best, marks = better
        taken += marks
    return dict(zip(names, stored.values(), strict=True)), tuple(dict.fromkeys(taken))


def _best(
    names: list[str], best: int, fitting: Callable[[Iterable[str]], int]
) -> tuple[list[str], int, tuple[str, ...]] | None:
    """The prefix, or pair of prefixes that only help together, without which the names fit better; None without any."""
    found = None
    present = tuple(mark for mark in (*_ANYWHERE, *_LEADING) if any(mark in name for name in names))
    for count in (1, 2):
        for marks in itertools.permutations(present, count):
            changed = names
            for mark in marks:
                changed = [_without(name, mark) for name in changed]
            if changed == names or len(set(changed)) < len(changed):
                continue
            filled = fitting(changed)
            if filled > best:
                found, best = (changed, filled, marks), filled
        if found is not None:
            break
    return found


def _without(name: str, mark: str) -> str:
    if mark in _ANYWHERE:
        return name.replace(mark, "")
    return _LEADING[mark] + name.removeprefix(mark) if name.startswith(mark) else name
