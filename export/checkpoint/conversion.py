"""Maps the tensors of a checkpoint to the module's parameters, without reading their values.

For each architecture, transformers declares how stored names map to parameters, and by which operations (stack the
experts, concatenate gate and up, split a fused matrix). This module follows the declarations as transformers' loader
does, but each operation returns a `LazyWeight` over the stored tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from satchel.export.checkpoint.structure import one_line
from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight, concatenated
from satchel.graphs.quant.stored import GRID, WIDENED, StoredGrid

Sources = dict[str, list[LazyWeight]]


@dataclass
class _Conversion:
    """The stored tensors, by the converter's pattern, that become one or more parameters."""

    converter: WeightConverter
    sources: Sources = field(default_factory=dict)


def convert(
    module: PreTrainedModel, stored: Mapping[str, LazyWeight], source: str, unplaced: list[str] | None = None
) -> dict[str, LazyWeight]:
    """Return the module's weights from the stored tensors; tensors that the module does not use are dropped.

    Args:
        module: The model; its `state_dict()` has the required names and shapes.
        stored: Tensors by their names in the checkpoint.
        source: What to name in an error.
        unplaced: Gets the names of the tensors that are dropped.

    Raises:
        ExportError: If stored tensors do not fit the architecture's operations.
    """
    wanted = module.state_dict()
    converters = [t for t in get_model_conversion_mapping(module) if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}

    weights: dict[str, LazyWeight] = {}
    conversions: dict[str, _Conversion] = {}
    for name, target, pattern in places(module, stored):
        if target not in wanted:
            if unplaced is not None:
                unplaced.append(name)
        elif pattern is None:
            weights.setdefault(target, stored[name])
        else:
            conversion = conversions.setdefault(target, _Conversion(by_pattern[pattern]))
            conversion.sources.setdefault(pattern, []).append(stored[name])
    latest = _Latest()
    for target, conversion in conversions.items():
        weights.update(_converted(target, conversion, module, source, latest))
    return weights


def places(module: PreTrainedModel, names: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """Yield each stored name in natural order, the module's name that it belongs to, and its converter's pattern."""
    wanted = module.state_dict()
    transforms = get_model_conversion_mapping(module)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, module.base_model_prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        yield name, target, pattern


def _converted(
    target: str, conversion: _Conversion, module: PreTrainedModel, source: str, latest: _Latest
) -> dict[str, LazyWeight]:
    try:
        # On the meta device, the operations return names and shapes, and check that the sources fit.
        shapes = {name: tuple(t.shape) for name, t in _run(target, conversion, module, _meta).items()}
        lazy = _LAZY.get(_recipe(conversion.converter))
        whole = _Whole(target, conversion, module, latest)
        weights = lazy(conversion) if lazy is not None else [whole.weight(n, s) for n, s in shapes.items()]
        mark_converted(weights, conversion, lazy)
        return dict(zip(shapes, weights, strict=True))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ExportError(f"{source}: the tensors stored for {target} do not fit together: {one_line(error)}") from None


def mark_converted(
    weights: list[LazyWeight], conversion: _Conversion, lazy: Callable[[_Conversion], list[LazyWeight]] | None
) -> None:
    """Mark what is made of quantized weights with the grid that the same operation makes of theirs."""
    sources = [weight for found in conversion.sources.values() for weight in found]
    grids = [weight.meta.get(GRID) for weight in sources]
    stored = [grid for grid in grids if isinstance(grid, StoredGrid)]
    if not stored and not any(WIDENED in weight.meta for weight in sources):
        return
    form = dataclasses.replace(stored[0], scales=sources[0], zero_points=None) if stored else None
    if form is None or lazy is None or len(stored) < len(sources) or any(not same_form(g, form) for g in stored):
        reasons = [str(weight.meta[WIDENED]) for weight in sources if WIDENED in weight.meta]
        for weight in weights:
            weight.meta[WIDENED] = reasons[0] if reasons else "it is made of weights that are quantized differently"
        return

    def made(part: Callable[[StoredGrid], LazyWeight | None]) -> list[LazyWeight]:
        parts = {p: [part(w.meta[GRID]) for w in found] for p, found in conversion.sources.items()}  # type: ignore[arg-type]
        return lazy(_Conversion(conversion.converter, parts))  # type: ignore[arg-type]

    scales = made(lambda grid: grid.scales)
    points = [None] * len(scales) if stored[0].zero_points is None else made(lambda grid: grid.zero_points)
    for weight, scale, point in zip(weights, scales, points, strict=True):
        weight.meta[GRID] = dataclasses.replace(stored[0], scales=scale, zero_points=point)


def same_form(grid: StoredGrid, other: StoredGrid) -> bool:
    """Whether weights on the two grids can be one weight."""
    return (
        grid.scheme == other.scheme
        and grid.token_activations == other.token_activations
        and grid.order is None
        and other.order is None
    )


def _meta(weight: LazyWeight) -> torch.Tensor:
    return torch.empty(weight.dims, device="meta")


def _real(weight: LazyWeight) -> torch.Tensor:
    return torch.from_numpy(np.array(weight.numpy()))


def _run(
    target: str, conversion: _Conversion, module: PreTrainedModel, read: Callable[[LazyWeight], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Run transformers' own operations on the sources, as returned by `read`."""
    converter: Any = deepcopy(conversion.converter)  # it accepts callables besides the declared futures
    for pattern, weights in conversion.sources.items():
        for weight in weights:
            converter.add_tensor(target, weight.name, pattern, partial(read, weight))
    results: dict[str, Any] = converter.convert(target, model=module, config=module.config)
    return {name: t[0] if isinstance(t, list) else t for name, t in results.items()}


@dataclass
class _Latest:
    """The most recent results, shared by all `_Whole` of a checkpoint, so that only one set is in memory."""

    owner: _Whole | None = None
    values: dict[str, torch.Tensor] = field(default_factory=dict)


class _Whole:
    """Parameters whose operations are not lazy: computed whole, and kept until another set is requested."""

    def __init__(self, target: str, conversion: _Conversion, module: PreTrainedModel, latest: _Latest) -> None:
        self._target, self._conversion, self._module, self._latest = target, conversion, module, latest

    def weight(self, name: str, shape: tuple[int, ...]) -> LazyWeight:
        return LazyWeight(name, shape, ir.DataType.FLOAT, lambda a, b: self._values(name)[a:b])

    def _values(self, name: str) -> np.ndarray:
        if self._latest.owner is not self:
            self._latest.values = {}
            self._latest.values = _run(self._target, self._conversion, self._module, _real)
            self._latest.owner = self
        values: np.ndarray = self._latest.values[name].numpy()
        return values


def _recipe(converter: WeightConverter) -> tuple[Any, ...]:
    """Return the converter's operations as a key: (type, dim) of each; None for one that depends on more."""
    return tuple(
        (type(op), op.dim) if getattr(op, "num_shards_attribute", None) is None and hasattr(op, "dim") else None
        for op in converter.operations
    )


def _stacks(conversion: _Conversion) -> list[LazyWeight]:
    """Return one [experts, ...] weight per pattern, in the converter's order; reading rows only reads those experts."""
    found = [conversion.sources[p] for p in conversion.converter.source_patterns if p in conversion.sources]
    return [_stack(weights) for weights in found]


def _stack(weights: list[LazyWeight]) -> LazyWeight:
    first = weights[0]
    return LazyWeight(
        first.name, (len(weights), *first.dims), first.dtype,
        rows=lambda a, b: np.stack([w.numpy() for w in weights[a:b]]),
        columns=lambda a, b: np.stack([w.rows(a, b) for w in weights]),
    )  # fmt: skip


def _joined(axis: int) -> Callable[[_Conversion], list[LazyWeight]]:
    def join(conversion: _Conversion) -> list[LazyWeight]:
        patterns = conversion.converter.source_patterns
        weights = [w for p in patterns for w in conversion.sources.get(p, [])]
        return [concatenated(weights, axis, weights[0].name)]

    return join


def _joined_stacks(conversion: _Conversion) -> list[LazyWeight]:
    stacks = _stacks(conversion)
    return [concatenated(stacks, 1, stacks[0].name)]


def _split(conversion: _Conversion) -> list[LazyWeight]:
    """Split the rows into one part per target; the last part is shorter if they do not divide evenly."""
    (weight,) = next(iter(conversion.sources.values()))
    step = -(-weight.row_count // len(conversion.converter.target_patterns))
    return [_part(weight, low, min(low + step, weight.row_count)) for low in range(0, weight.row_count, step)]


def _part(weight: LazyWeight, low: int, high: int) -> LazyWeight:
    return LazyWeight(
        weight.name, (high - low, *weight.dims[1:]), weight.dtype,
        rows=lambda a, b: weight.rows(low + a, low + b),
        columns=(lambda a, b: weight.columns(a, b)[low:high]) if len(weight.dims) > 1 else None,
    )  # fmt: skip


_LAZY: dict[tuple[Any, ...], Callable[[_Conversion], list[LazyWeight]]] = {
    ((MergeModulelist, 0),): _stacks,
    ((MergeModulelist, 0), (Concatenate, 1)): _joined_stacks,
    ((Concatenate, 0),): _joined(0),
    ((Concatenate, 1),): _joined(1),
    ((Chunk, 0),): _split,
}
"""Operations that only need the requested rows; all others are computed whole, one parameter at a time."""
