"""Reads the profile that ONNX Runtime writes of a session: its runs in order, with their kernels."""

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
"""Place of a kernel that belongs to no layer: before the layers (embedding, positions, mask) or after (head)."""

# Nodes over the whole cache or mask. They may run in the middle of a layer.
SHARED_NAMES = ("mask.", "kv_cache.", "last_token", "positions", "seqlens_k", "total_sequence_length")
# Nodes of an int8 cache name their layer, but run together for all layers, before the first and after the last.
CACHE_NAMES = ("kv_cache.", "present.")


@dataclass(frozen=True)
class Kernel:
    """One node of the optimized graph in one run. Times are in microseconds since the profile began.

    `facts` are further entries of the profile: shapes, provider, sizes.
    """

    name: str
    operator: str
    start: int
    duration: int
    facts: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of a session, and its kernels in execution order. Times are as in `Kernel`."""

    start: int
    duration: int
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class Place:
    """The layer of a kernel, or BEFORE or AFTER; `by_name` is False if it was inferred from its neighbors."""

    layer: int | str
    by_name: bool


def read_runs(path: Path) -> list[Run]:
    """The runs in a profile, in order. Raises SatchelError for a file that is not such a profile."""
    try:
        # Names of nodes come from the graph and may have control characters.
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"), strict=False)
        return _runs(events)
    except OSError as error:
        raise SatchelError(f"{path}: ONNX Runtime's profile cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SatchelError(
            f"{path}: ONNX Runtime's profile is invalid ({type(error).__name__}: {error}): "
            "free disk space for temporary files"
        ) from None


def place_kernels(names: Sequence[str], layers: int) -> list[Place]:
    """The place of each kernel of one run, given the names in execution order and the number of layers.

    A name with a layer number belongs to that layer. A kernel between two named ones belongs to the layer of the later:
    it computes an input of it. Kernels before the first and after the last, and those that serve all layers, belong to
    no layer.
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
    """For each entry the first number from it on."""
    found: list[int | None] = []
    current: int | None = None
    for layer in reversed(layers):
        current = current if layer is None else layer
        found.append(current)
    return found[::-1]


def _runs(events: list[dict[str, Any]]) -> list[Run]:
    """An event is written when it ends, so a run follows its kernels and precedes those of the next run."""
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
