"""What calibration observes before anything is rounded: the range of activations and of the KV cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from satchel.export.quantize.flow import Flow, Inputs, fresh
from satchel.export.quantize.kept import load, save
from satchel.graphs.analysis.channels import gated_input
from satchel.graphs.analysis.segments import split
from satchel.graphs.ir.contract import Refused
from satchel.graphs.ir.inputs import cached_layers
from satchel.runtime.bundle.contract import present_names

Progress = Callable[[int], Any]

BATCH = 4
"""Windows per batch."""


def observed(
    model: ir.Model, windows: NDArray[np.int64], folder: Path, int8_cache: bool, progress: Progress
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """What `_observe` returns, from `folder` if it is there already."""
    files = folder / "statistics.npz", folder / "maxima.npz"
    statistics, maxima = map(load, files)
    if statistics is not None and maxima is not None:
        progress(len(split(model, [])) - 1)
        return statistics, maxima
    shutil.rmtree(folder / "observe", ignore_errors=True)
    found = _observe(model, windows, folder, int8_cache, progress)
    for file, arrays in zip(files, found, strict=True):
        save(file, arrays)
    return found


def _observe(
    model: ir.Model, windows: NDArray[np.int64], folder: Path, int8_cache: bool, progress: Progress
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
    """Collect the calibration statistics.

    Returns the RMS of each down projection's input channels, [inputs] by node name, and the max magnitudes of the KV
    caches, [kv_heads, head_dim] by output name.
    """
    statistics: dict[str, NDArray[np.float32]] = {}
    maxima: dict[str, NDArray[np.float32]] = {}

    def visit(node: ir.Node, inputs: Inputs) -> Mapping[str, NDArray[Any]]:
        if _gated(node):
            sums = [(np.square(x, dtype=np.float32).sum(0, dtype=np.float64), len(x)) for x in inputs()]
            count = sum(n for _, n in sums)
            statistics[str(node.name)] = np.sqrt(sum(s for s, _ in sums) / count).astype(np.float32)
        return {}

    def observe(name: str, array: NDArray[Any]) -> None:
        largest = np.abs(array).max(axis=(0, 2))
        maxima[name] = np.maximum(maxima[name], largest) if name in maxima else largest

    caches = [name for layer in cached_layers(model) for name in present_names(layer)] if int8_cache else []
    flow = Flow(model, batched(windows), fresh(folder, "observe"), batch=BATCH)
    flow.run(visit, observe, caches, progress)
    return statistics, maxima


def _gated(node: ir.Node) -> bool:
    """Whether smoothing considers the node: a down projection, or a node that it refuses as one."""
    try:
        return gated_input(node) is not None
    except Refused:
        return True


def batched(windows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Drop the windows that do not fill a batch."""
    return windows[: max(BATCH, len(windows) // BATCH * BATCH)]
