"""Reads ONNX Runtime's profile of a session: its runs in order, and the kernels of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from satchel.runtime.errors import SatchelError
from satchel.runtime.tools.profiling.layer_names import layer_of

KERNEL_SUFFIX = "_kernel_time"
RUN_EVENT = "model_run"

BEFORE, AFTER = "before", "after"
"""Where a kernel is that belongs to no layer: before the layers (embedding, positions, mask) or after them (head)."""

# Nodes over the whole cache or mask. They run when their inputs are there, which may be in the middle of a layer.
SHARED_NAMES = ("mask.", "kv_cache.", "last_token", "positions", "seqlens_k", "total_sequence_length")
# An int8 cache's nodes name their layer, but those of all layers run together, before the first and after the last.
CACHE_NAMES = ("kv_cache.", "present.")


@dataclass(frozen=True)
class Kernel:
    """One node of the optimized graph in one run. Times are in microseconds since the profile began.

    `facts` is what else ONNX Runtime says of it: shapes, provider, sizes.
    """

    name: str
    operator: str
    start: int
    duration: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of a session, and its kernels in the order in which they ran. Times are as those of `Kernel`."""

    start: int
    duration: int
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class Place:
    """The layer that a kernel belongs to, or BEFORE or AFTER; `by_name` is False where its neighbors tell."""

    layer: int | str
    by_name: bool


def read_runs(path: Path) -> list[Run]:
    """The runs in a profile, in order. Raises SatchelError for a file that is no such profile."""
    try:
        # Names of nodes come from the graph: a control character in one is no reason to stop.
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)
        return _runs(events)
    except OSError as error:
        raise SatchelError(f"{path}: ONNX Runtime's profile cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SatchelError(
            f"{path}: ONNX Runtime's profile makes no sense ({type(error).__name__}: {error}): "
            "free some space where temporary files go"
        ) from None


def place_kernels(names: Sequence[str], layers: int) -> list[Place]:
    """The place of each kernel of one run, given the names in order and the number of layers.

    A name with a layer's number in it says it. Any other kernel that runs between two that are named belongs to the
    later one's layer: it adds to, or norms, what that layer reads. Before the first and after the last, and where a
    node serves all layers, it is outside them.
    """
    own = [layer_of(name) for name in names]
    own = [layer if layer is not None and layer < layers else None for layer in own]
    spine = [None if name.startswith(CACHE_NAMES) else layer for name, layer in zip(names, own, strict=True)]
    ahead = _following(spine)
    behind = _following(spine[::-1])[::-1]
    places = []
    for name, layer, earlier, later in zip(names, own, behind, ahead, strict=True):
        if layer is not None:
            places.append(Place(layer, by_name=True))
        elif later is None and earlier is not None:
            places.append(Place(AFTER, by_name=False))
        elif later is None or earlier is None or name.startswith(SHARED_NAMES):
            places.append(Place(BEFORE, by_name=False))
        else:
            places.append(Place(max(earlier, later), by_name=False))
    return places


def _following(layers: Sequence[int | None]) -> list[int | None]:
    """For each entry the first number at it or after it."""
    found: list[int | None] = []
    current: int | None = None
    for layer in reversed(layers):
        current = current if layer is None else layer
        found.append(current)
    return found[::-1]


def _runs(events: list[dict[str, Any]]) -> list[Run]:
    """Each event is written when it ends, so a run comes after its kernels and before those of the next."""
    runs, kernels = [], []
    for event in events:
        name, start, duration = str(event["name"]), int(event["ts"]), int(event["dur"])
        if event["cat"] == "Node" and name.endswith(KERNEL_SUFFIX):
            facts = dict(event["args"])
            operator = str(facts.pop("op_name"))
            kernels.append(Kernel(name.removesuffix(KERNEL_SUFFIX), operator, start, duration, facts))
        elif event["cat"] == "Session" and name == RUN_EVENT:
            runs.append(Run(start, duration, tuple(kernels)))
            kernels = []
    return runs
