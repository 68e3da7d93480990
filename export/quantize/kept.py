"""Results of calibration and rounding on disk, from which an interrupted export goes on."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.graphs.quant.quantized import QuantizedWeight
from satchel.graphs.quant.recipe import Scheme
from satchel.graphs.quant.rounding import Grid


def save(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays by name into an .npz file, which appears when it is whole."""
    part, named = path.with_suffix(".part"), {f"_{name}": array for name, array in arrays.items()}
    with part.open("wb") as file:
        np.savez(file, allow_pickle=False, **named)
    part.replace(path)


def load(path: Path) -> dict[str, NDArray[Any]] | None:
    """The arrays of a file that `save` wrote, or None if it is not there."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as stored:
        return {name.removeprefix("_"): stored[name] for name in stored.files}


class RoundedWeights:
    """Quantized weights in a folder: for each a file of quantized values, and one that names it once it is whole.

    Several threads may each add weights.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, int] = {}
        for path in folder.glob("*.npz"):
            name = str((load(path) or {})["name"])
            self._places[name] = int(path.stem)
        self._new = itertools.count(max(self._places.values(), default=-1) + 1)

    def values(self, shape: tuple[int, int], dtype: type) -> np.memmap[Any, Any]:
        """A mapped array of a new file, for the quantized values of a weight."""
        return np.memmap(self._path(next(self._new), "codes"), dtype, "w+", shape=shape)

    def add(self, name: str, grid: Grid, values: np.memmap[Any, Any]) -> QuantizedWeight:
        """The weight with these values, which `values` gave, and their grid, both on disk."""
        place = int(Path(str(values.filename)).stem)
        points = {} if grid.zero_points is None else {"zero_points": grid.zero_points}
        values.flush()
        save(self._path(place, "npz"), {"name": np.asarray(name), "scales": grid.scales, **points})
        self._places[name] = place
        return self._mapped(name, grid, values.shape[1])

    def get(self, name: str, scheme: Scheme | None, inputs: int) -> QuantizedWeight | None:
        """A weight that was rounded before, [outputs, `inputs`], or None."""
        if name not in self._places or scheme is None:
            return None
        stored = load(self._path(self._places[name], "npz")) or {}
        return self._mapped(name, Grid(scheme, stored["scales"], stored.get("zero_points")), inputs)

    def _path(self, place: int, kind: str) -> Path:
        return self._folder / f"{place}.{kind}"

    def _mapped(self, name: str, grid: Grid, inputs: int) -> QuantizedWeight:
        dtype = np.int8 if grid.zero_points is None else np.uint8
        path, shape = self._path(self._places[name], "codes"), (len(grid.scales), inputs)
        mapped: NDArray[Any] = np.memmap(path, dtype, "r", shape=shape)
        return QuantizedWeight(name, grid, mapped)
