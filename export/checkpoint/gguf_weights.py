"""Maps the tensors of a GGUF file to the module's parameters, and undoes the changes of the conversion to GGUF."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from satchel.export.checkpoint.conversion import same_form
from satchel.export.checkpoint.gguf_architectures import Architecture
from satchel.export.checkpoint.gguf_config import LONG_FACTORS, SHORT_FACTORS
from satchel.export.checkpoint.gguf_file import GgufFile
from satchel.export.checkpoint.structure import one_line
from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight, concatenated, from_array, mapped, transposed
from satchel.graphs.quant.stored import GRID, WIDENED, StoredGrid

_ROPE_FACTORS = "rope_freqs.weight"
_QUERY, _KEY, _VALUE, _QKV = "attn_q", "attn_k", "attn_v", "attn_qkv"
_EXPERTS: dict[str, tuple[str, tuple[str, ...], int]] = {
    ".experts.gate_up_proj": ("ffn_gate_up_exps.weight", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), 1),
    ".experts.gate_up_proj_bias": ("ffn_gate_up_exps.bias", ("ffn_gate_exps.bias", "ffn_up_exps.bias"), 1),
    ".experts.down_proj": ("ffn_down_exps.weight", (), 1),
    ".experts.down_proj_bias": ("ffn_down_exps.bias", (), 1),
    ".self_attn.sinks": ("attn_sinks.weight", (), 0),
    ".shared_mlp.input_linear.weight": (
        "ffn_gate_up_shexp.weight",
        ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
        0,
    ),
    ".e_score_correction_bias": ("exp_probs_b.bias", (), 0),
}
"""Parameters of experts and attention: the tensor that holds one whole, or those to join, and along which axis."""

_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")
_HEAD_NORM = re.compile(r"\.(q|k)_layernorm\.norms\.(\d+)\.weight$")
_UNUSED = re.compile(r"blk\.\d+\.(?:attn_rot_embd|rope_freqs)(?:\.weight)?|rope_freqs\.weight")
"""Tensors that no runtime reads for itself."""


def gguf_weights(module: PreTrainedModel, file: GgufFile, architecture: Architecture) -> dict[str, LazyWeight]:
    """Return the module's weights from the file's tensors; tied weights are left to `tie`.

    A bias that no layer of the file has is zero. If the file stores rotary factors as a tensor, the module's frequency
    buffers are scaled in place.

    Raises:
        ExportError: If the file contains a tensor that the module does not use.
    """
    finder = _Finder(module, file, architecture)
    wanted = module.state_dict()
    weights = {}
    for name, parameter in wanted.items():
        try:
            weight = finder.find(name)
        except ValueError as error:
            raise ExportError(
                f"{file.path}: the tensors of {name} do not fit together: {one_line(error)}; convert the file again"
            ) from None
        if weight is not None:
            weights[name] = _shaped(weight, tuple(parameter.shape))
    found = {_LAYER.sub(".", name) for name in weights}
    for name, parameter in wanted.items():
        if name.endswith(".bias") and _LAYER.sub(".", name) not in found:
            weights[name] = from_array(name, np.zeros(tuple(parameter.shape), np.float32))
    if _ROPE_FACTORS in file.tensors:
        _scale_frequencies(module, file)
    used = finder.used | ({LONG_FACTORS, SHORT_FACTORS} if _has_longrope(module) else set())
    left = sorted(name for name in file.tensors.keys() - used if not _is_unread(name, module))
    if left:
        raise ExportError(
            f"{file.path}: tensor {left[0]} is not part of a {architecture.model_type} model as satchel reads it; "
            "export from the original float checkpoint"
        )
    return weights


class _Finder:
    """Finds the tensors of a file that a parameter consists of, and notes them as used."""

    def __init__(self, module: PreTrainedModel, file: GgufFile, architecture: Architecture) -> None:
        config: Any = module.config
        self.used: set[str] = set()
        self._tensors, self._architecture, self._metadata = file.tensors, architecture, file.metadata
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = config.head_dim
        kind = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[file.metadata["general.architecture"]]
        self._names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)

    def find(self, name: str) -> LazyWeight | None:
        """Return a parameter as the module has it, except for its shape; None if the file does not have it."""
        layer = _LAYER.search(name)
        block = f"blk.{layer[1]}." if layer else ""
        head_norm = _HEAD_NORM.search(name)
        if head_norm:
            return self._row(f"{block}attn_{head_norm[1]}_norm.weight", int(head_norm[2]))
        for key, end in self._architecture.by_layer.items():
            if layer and name.endswith(end):
                return self._number(key, int(layer[1]), name)
        for end, (whole, parts, axis) in _EXPERTS.items():
            if name.endswith(end):
                found = self._take(f"{block}{whole}") or self._joined([f"{block}{part}" for part in parts], axis, name)
                turns = self._architecture.by_input and ".experts." in end
                return _by_input(found, "gate_up" in end) if turns and found is not None else found
        stem, _, suffix = name.rpartition(".")
        stored = self._stored(stem, block)
        weight = self._whole(stored, suffix, name)
        return None if weight is None else self._restored(name, stored, weight)

    def _stored(self, stem: str, block: str) -> str:
        """Return the name of the tensor, without its suffix, that holds a module's parameter."""
        for end, tensor in self._architecture.names.items():
            if stem.endswith(f".{end}"):
                return f"{block}{tensor}"
        # The name maps of some families have no head, which is tied, but a file may store one anyway.
        return "output" if stem == "lm_head" else str(self._names.get_name(stem))

    def _whole(self, stored: str, suffix: str, name: str) -> LazyWeight | None:
        """Return a tensor, split from or joined of those that the file has instead."""
        found = self._take(f"{stored}.{suffix}")
        if found is not None and not (name.endswith("gate_up_proj.weight") and self._gate(stored) in self._tensors):
            return found
        block, _, kind = stored.rpartition(".")
        if kind == _QKV:
            return self._joined([f"{block}.{part}.{suffix}" for part in (_QUERY, _KEY, _VALUE)], 0, name)
        if kind in (_QUERY, _KEY, _VALUE):
            fused = self._take(f"{block}.{_QKV}.{suffix}")
            return None if fused is None else self._part(fused, kind)
        if name.endswith("gate_up_proj.weight"):
            return self._joined([self._gate(stored), f"{stored}.{suffix}"], 0, name)
        return None

    def _gate(self, stored: str) -> str:
        return f"{stored.rpartition('.')[0]}.ffn_gate.weight"

    def _part(self, fused: LazyWeight, kind: str) -> LazyWeight:
        first = {_QUERY: 0, _KEY: self._heads, _VALUE: self._heads + self._kv_heads}[kind]
        count = self._heads if kind == _QUERY else self._kv_heads
        low, high = first * self._head_dim, (first + count) * self._head_dim
        return _marked([fused], lambda parts: _span(parts[0], low, high))

    def _take(self, name: str) -> LazyWeight | None:
        if name not in self._tensors:
            return None
        self.used.add(name)
        return self._tensors[name]

    def _joined(self, names: list[str], axis: int, name: str) -> LazyWeight | None:
        if not names or not all(part in self._tensors for part in names):
            return None
        self.used.update(names)
        return _marked([self._tensors[part] for part in names], lambda parts: concatenated(parts, axis, name))

    def _number(self, key: str, layer: int, name: str) -> LazyWeight:
        """Return the number of a layer in the metadata as a weight [1]."""
        stored = self._metadata.get(f"{self._metadata['general.architecture']}.{key}")
        numbers = stored if isinstance(stored, list) else [stored] * (layer + 1)
        if layer >= len(numbers) or not isinstance(numbers[layer], int | float):
            raise ValueError(f"{key} has no number for layer {layer}")
        return from_array(name, np.asarray([numbers[layer]], np.float32))

    def _row(self, name: str, index: int) -> LazyWeight | None:
        stacked = self._take(name)
        if stacked is None or len(stacked.dims) != 2 or index >= stacked.row_count:
            return None
        return LazyWeight(name, stacked.dims[1:], stacked.dtype, lambda a, b: stacked.rows(index, index + 1)[0, a:b])

    def _restored(self, name: str, stored: str, weight: LazyWeight) -> LazyWeight:
        architecture, kind = self._architecture, stored.rpartition(".")[2]
        if architecture.permuted and kind in (_QUERY, _KEY):
            heads = self._heads if kind == _QUERY else self._kv_heads
            return _marked([weight], lambda parts: permuted_rows(parts[0], heads))
        if architecture.per_head and kind == _QKV:
            return _marked([weight], lambda parts: _rows_by_head(parts[0], self._heads))
        if name.endswith(architecture.transposed):
            return transposed(weight, weight.name)
        if architecture.norm_offset and name.endswith("norm.weight"):
            offset = np.float32(architecture.norm_offset)
            return mapped(weight, lambda values: values - offset, weight.name)
        return weight


def _marked(sources: list[LazyWeight], make: Callable[[list[LazyWeight]], LazyWeight]) -> LazyWeight:
    """Return what `make` makes of weights by moving outputs, marked with the grid that it makes of theirs."""
    weight = make(sources)
    grids = [grid for source in sources if isinstance(grid := source.meta.get(GRID), StoredGrid)]
    reasons = [str(source.meta[WIDENED]) for source in sources if WIDENED in source.meta]
    weight.meta.clear()
    if len(grids) == len(sources) and all(same_form(grid, grids[0]) for grid in grids):
        points = [grid.zero_points for grid in grids if grid.zero_points is not None]
        weight.meta[GRID] = dataclasses.replace(
            grids[0], scales=make([grid.scales for grid in grids]), zero_points=make(points) if points else None
        )
    elif grids or reasons:
        weight.meta[WIDENED] = reasons[0] if reasons else "it is made of tensors of different types"
    return weight


def _by_input(stack: LazyWeight, gated: bool) -> LazyWeight:
    """Return experts [experts, outputs, inputs] as [experts, inputs, outputs], or biases [experts, outputs] as stored.

    Outputs that are all gates and then all ups come in turn.
    """
    outputs = np.arange(stack.dims[1])
    order = outputs.reshape(2, -1).T.reshape(-1) if gated else outputs

    def rows(start: int, stop: int) -> np.ndarray:
        part = stack.rows(start, stop)[:, order]
        return part.swapaxes(1, 2) if part.ndim > 2 else part

    dims = (stack.dims[0], *reversed(stack.dims[1:]))
    made = LazyWeight(stack.name, dims, stack.dtype, rows)
    if GRID in stack.meta or WIDENED in stack.meta:
        made.meta[WIDENED] = str(stack.meta.get(WIDENED, "stacks of experts by input are not kept"))
    return made


def permuted_rows(weight: LazyWeight, heads: int) -> LazyWeight:
    """Permute rows from interleaved rotary pairs (0, half, 1, half + 1, ...) back to halves, per head.

    This undoes the permutation that llama.cpp's conversion applies to the query and key projections of Llama models.
    """

    def order(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)  # [heads, pair, half]

    return _reordered(weight, order, weight.row_count // heads)


def _rows_by_head(weight: LazyWeight, heads: int) -> LazyWeight:
    """Order the rows of a fused projection by head, then query, key, value; stored the other way round."""

    def order(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(3, heads, -1).swapaxes(0, 1).reshape(-1)

    return _reordered(weight, order, weight.row_count)


def _reordered(weight: LazyWeight, order: Callable[[np.ndarray], np.ndarray], group: int) -> LazyWeight:
    """Return row `order(all rows)[i]` of a weight as row i; each group of rows is made of itself."""
    if group < 2 or weight.row_count % group:
        raise ValueError(f"{weight!r} cannot be ordered in groups of {group}")
    source = order(np.arange(weight.row_count))

    def rows(start: int, stop: int) -> np.ndarray:
        low, high = start // group * group, -(-stop // group) * group
        taken: np.ndarray = weight.rows(low, high)[source[start:stop] - low]
        return taken

    columns = (lambda a, b: weight.columns(a, b)[source]) if len(weight.dims) > 1 else None
    return LazyWeight(weight.name, weight.dims, weight.dtype, rows, columns)


def _span(weight: LazyWeight, low: int, high: int) -> LazyWeight:
    """Return the rows `low` to `high` of a weight."""
    return LazyWeight(
        weight.name, (min(high, weight.row_count) - min(low, weight.row_count), *weight.dims[1:]), weight.dtype,
        rows=lambda a, b: weight.rows(low + a, low + b),
        columns=(lambda a, b: weight.columns(a, b)[low:high]) if len(weight.dims) > 1 else None,
    )  # fmt: skip


def _shaped(weight: LazyWeight, shape: tuple[int, ...]) -> LazyWeight:
    """Add or drop a dimension of 1, as the gate of a shared expert has, which files store both ways."""
    if weight.dims == (1,) and not shape:
        return from_array(weight.name, weight.numpy().reshape(shape))
    if weight.dims == (1, *shape) and len(shape) == 1:
        return LazyWeight(weight.name, shape, weight.dtype, lambda a, b: weight.columns(a, b)[0])
    if shape == (1, *weight.dims) and len(shape) == 2:
        return LazyWeight(weight.name, shape, weight.dtype, lambda a, b: weight.numpy()[None][a:b])
    return weight


def _is_unread(name: str, module: PreTrainedModel) -> bool:
    """Whether no runtime reads a tensor for itself, or it belongs to blocks that predict further tokens."""
    layer = re.match(r"blk\.(\d+)\.", name)
    return bool(_UNUSED.fullmatch(name)) or (layer is not None and int(layer[1]) >= module.config.num_hidden_layers)


def _has_longrope(module: PreTrainedModel) -> bool:
    rope: Any = getattr(module.config, "rope_parameters", None) or {}
    return bool(rope.get("rope_type") == "longrope")


def _scale_frequencies(module: PreTrainedModel, file: GgufFile) -> None:
    """Divide the rotary frequencies by the file's factors, the stored form of Llama 3's scaling."""
    factors = torch.from_numpy(np.array(file.tensors[_ROPE_FACTORS].numpy()))
    for name, buffer in module.named_buffers():
        if not name.endswith("inv_freq"):
            continue
        if buffer.shape != factors.shape:
            raise ExportError(
                f"{file.path}: {_ROPE_FACTORS} has {factors.numel()} factors for {buffer.numel()} frequencies; "
                "export from the original float checkpoint"
            )
        buffer.div_(factors)
