"""Reads adapters in PEFT's format, and merges them into the weights of their base while these are read.

The formulas are those of PEFT's `merge_and_unload` (https://huggingface.co/docs/peft): a low-rank adapter adds
`scaling * B @ A` to a weight [out, in]; DoRA (https://arxiv.org/abs/2402.09353) then gives each row the stored length.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from satchel.export.checkpoint.adapter_notes import notes_on_adapter
from satchel.export.checkpoint.companions import read_json
from satchel.export.checkpoint.record import Checkpoint
from satchel.export.checkpoint.safetensors_file import read_safetensors
from satchel.export.checkpoint.ties import tie
from satchel.export.checkpoint.torch_file import read_torch
from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight, scaled, transposed

CONFIG = "adapter_config.json"
_FILES = {"adapter_model.safetensors": read_safetensors, "adapter_model.bin": read_torch}
_PARTS = re.compile(
    r"(?P<path>.+)\.(?P<part>lora_(embedding_)?[AB]|lora_magnitude_vector)(\.default)?(\.(?P<kind>weight|bias))?"
)
_OTHER_MEANING = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora",
)  # fmt: skip
"""Settings with which an adapter is more than a product of two matrices per layer."""

_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is."""

ROWS = 1024
"""Of a weight whose rows are measured, at a time."""

MERGE_WITH_PEFT = "merge it with peft (merge_and_unload, then save_pretrained) and export the merged folder"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter that is to be merged: the share that it gets, and its tensors by the names of its base.

    Attributes:
        folder: Where it is.
        file: The file with its tensors.
        share: What its changes are multiplied by.
        layers: The parts of each changed layer, by the layer's name: `lora_A`, `lora_B` and what else it has.
        scaling: The factor of each layer's product.
        replaced: Whole tensors that it stores in place of the base's.
        apart: The names among them that leave a tied weight as it is for the other name (modules_to_save).
    """

    folder: Path
    file: Path
    share: float
    layers: Mapping[str, Mapping[str, LazyWeight]]
    scaling: Mapping[str, float]
    replaced: Mapping[str, LazyWeight]
    apart: frozenset[str]


def split_share(text: str | Path) -> tuple[Path, float]:
    """FOLDER=0.5 as the folder and its share, 1 if none is given.

    Raises:
        ExportError: The share is not a finite number.
    """
    folder, separator, share = str(text).rpartition("=")
    if not separator or Path(text).is_dir():
        return Path(text), 1.0
    try:
        value = float(share)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ExportError(
            f"--adapter {text}: the share after = must be a number, such as {folder}=0.5; NAME=FOLDER goes with "
            "--adapters separate"
        )
    return Path(folder), value


def read_adapter(text: str | Path) -> Adapter:
    """Read an adapter's folder, or FOLDER=SHARE.

    Raises:
        ExportError: It is not a LoRA adapter of PEFT's format, it is damaged, or it has settings that cannot be merged.
    """
    folder, share = split_share(text)
    if not (folder / CONFIG).is_file():
        raise ExportError(f"{folder / CONFIG}: no such file; --adapter takes a folder that PEFT has written")
    table = read_json(folder / CONFIG)
    _check_settings(table, folder)
    file = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if file is None:
        raise ExportError(f"{folder}: no tensors of the adapter found; looked for {', '.join(_FILES)}")
    layers: dict[str, dict[str, LazyWeight]] = {}
    replaced = {}
    for name, tensor in _FILES[file.name](file).items():
        name = name.removeprefix("base_model.model.")
        found = _PARTS.fullmatch(name)
        if found is None:
            replaced[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
            continue
        part = found["part"] + (".bias" if found["kind"] == "bias" else "")
        layers.setdefault(found["path"].replace(".base_layer", ""), {})[part] = tensor
    if not layers and not replaced:
        raise ExportError(f"{file}: holds no tensors, so this adapter changes nothing; leave it out or train it again")
    other = next((name for name in replaced if "lora_" in name or "trainable_tokens" in name), None)
    if other is not None:
        raise ExportError(f"{file}: {other} cannot be merged by satchel; {MERGE_WITH_PEFT}")
    scaling = {path: _scaling(path, parts, table, file) for path, parts in layers.items()}
    if share != 1 and (replaced or any("lora_magnitude_vector" in parts for parts in layers.values())):
        what = next(iter(replaced), "DoRA's lengths")
        raise ExportError(f"--adapter {text}: it replaces {what}, of which there is no share; leave ={share:g} out")
    saved = set(table.get("modules_to_save") or ())
    apart = frozenset(name for name in replaced if saved & set(name.split(".")))
    return Adapter(folder, file, share, layers, scaling, replaced, apart)


def base_of(folder: Path) -> str:
    """The base that an adapter's config names, if it is a folder here; else BASE."""
    named = read_json(folder / CONFIG).get("base_model_name_or_path")
    for base in (folder / named, Path(named)) if isinstance(named, str) and named else ():
        if base.is_dir() and (base / "config.json").is_file() and base.resolve() != folder.resolve():
            return str(base)
    return f"BASE (a folder of {named})" if isinstance(named, str) and named else "BASE"


def with_adapters(checkpoint: Checkpoint, adapters: Sequence[str | Path]) -> Checkpoint:
    """Return the checkpoint with adapters merged, each a folder or FOLDER=SHARE.

    Raises:
        ExportError: One cannot be read, or does not fit the checkpoint.
    """
    read = [read_adapter(text) for text in adapters]
    if not read:
        return checkpoint
    weights = merge(checkpoint.weights, read, checkpoint.module)
    if isinstance(checkpoint.module, PreTrainedModel):
        tie(checkpoint.module, weights)
    sources = [path for adapter in read for path in (adapter.folder / CONFIG, adapter.file)]
    notes = [note for adapter in read for note in _notes(adapter, checkpoint)]
    return dataclasses.replace(
        checkpoint, weights=weights, sources=(*checkpoint.sources, *sources), notes=(*checkpoint.notes, *notes)
    )


def _notes(adapter: Adapter, checkpoint: Checkpoint) -> Iterator[str]:
    """A line for each change of a weight that the base ties, and what else is in the folder."""
    yield from notes_on_adapter(adapter.folder, checkpoint)
    weights = checkpoint.weights
    for name in (f"{path}.weight" for path in adapter.layers):
        other = next((each for each in weights if each != name and weights[each] is weights[name]), None)
        if other is not None:
            yield (
                f"{adapter.folder}: its change of {name} is one of {other} too, because the base ties them; peft "
                "merges so as well, but the adapter was trained on one of them"
            )


def _check_settings(table: Mapping[str, Any], folder: Path) -> None:
    path = folder / CONFIG
    if table.get("peft_type") != "LORA":
        raise ExportError(
            f"{path}: peft_type {table.get('peft_type')!r} is not supported, only LORA (with rsLoRA and DoRA); "
            f"{MERGE_WITH_PEFT}"
        )
    used = next((name for name in _OTHER_MEANING if table.get(name)), None)
    if used is not None:
        raise ExportError(f"{path}: {used} is not supported; {MERGE_WITH_PEFT}")
    start = table.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ExportError(f"{path}: init_lora_weights {start!r} changes the base as well; {MERGE_WITH_PEFT}")


def _scaling(path: str, parts: Mapping[str, LazyWeight], table: Mapping[str, Any], file: Path) -> float:
    """The factor of a layer's product; checks the ranks of its two matrices."""
    first, second = (parts.get("lora_A"), parts.get("lora_B"))
    if first is None and second is None:
        first, second = (parts.get("lora_embedding_A"), parts.get("lora_embedding_B"))
    if first is None or second is None:
        lost = "lora_A" if first is None else "lora_B"
        raise ExportError(f"{file}: {path} has no {lost}; save the adapter again")
    rank = _of_pattern(table, "rank_pattern", path, table.get("r"))
    alpha = _of_pattern(table, "alpha_pattern", path, table.get("lora_alpha"))
    if len(first.dims) != 2 or len(second.dims) != 2 or not first.dims[0] == second.dims[1] == rank:
        raise ExportError(
            f"{file}: the ranks of {path} do not fit: A {list(first.dims)}, B {list(second.dims)}, and {CONFIG} says "
            f"rank {rank}; use the config that belongs to these tensors"
        )
    if not isinstance(alpha, int | float):
        raise ExportError(f"{file.parent / CONFIG}: lora_alpha {alpha!r} is not a number; save the adapter again")
    return float(alpha) / (math.sqrt(rank) if table.get("use_rslora") else rank)


def _of_pattern(table: Mapping[str, Any], name: str, path: str, default: Any) -> Any:
    """The value for a layer: that of the first pattern that its name ends in, as PEFT's `get_pattern_key` finds it."""
    for pattern, value in (table.get(name) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def merge(
    weights: Mapping[str, LazyWeight], adapters: Sequence[Adapter], module: torch.nn.Module
) -> dict[str, LazyWeight]:
    """Return the weights with the changes of all adapters; names that the adapters do not change stay as they are.

    Args:
        weights: By the names of the module's `state_dict()`.
        adapters: They are merged in this order.
        module: The base, which says how a layer's weight lies.

    Raises:
        ExportError: An adapter changes a layer that the base does not have, or its shapes are not those of the base.
    """
    result = dict(weights)
    for adapter in adapters:
        before = dict(result)

        def put(name: str, new: LazyWeight, alone: bool = False, before: Mapping[str, LazyWeight] = before) -> None:
            # PEFT merges into a tied weight itself, so under both of its names.
            names = [other for other in before if before[other] is before[name]]
            result.update(dict.fromkeys([name] if alone else names, new))

        for name, tensor in adapter.replaced.items():
            check_base(name in result and result[name].dims == tensor.dims, adapter, name, tensor.dims, result)
            put(name, tensor, name in adapter.apart)
        for path, parts in adapter.layers.items():
            name = f"{path}.weight"
            check_base(name in result, adapter, name, (), result)
            original = adapter.replaced.get(name, weights[name])
            put(name, _merged(name, original, result[name], adapter, path, module))
            bias = parts.get("lora_B.bias")
            if bias is not None:
                check_base(f"{path}.bias" in result, adapter, f"{path}.bias", bias.dims, result)
                result[f"{path}.bias"] = _sum(result[f"{path}.bias"], bias, adapter.share * adapter.scaling[path])
    return result


def check_base(fits: bool, adapter: Adapter, name: str, dims: Sequence[int], weights: Mapping[str, LazyWeight]) -> None:
    """Raise ExportError, which names both shapes, unless a tensor of the adapter `fits` the base's."""
    if not fits:
        found = f"has the shape {list(weights[name].dims)}" if name in weights else "does not exist"
        asked = f", and the adapter's is {list(dims)}" if name in weights else ""
        raise ExportError(
            f"{adapter.file}: is an adapter for another base: {name} {found} here{asked}; "
            f"give the base that base_model_name_or_path in {CONFIG} names"
        )


def _merged(
    name: str, original: LazyWeight, weight: LazyWeight, adapter: Adapter, path: str, module: torch.nn.Module
) -> LazyWeight:
    """One changed weight; `original` is that of the base, by which DoRA measures lengths."""
    parts = adapter.layers[path]
    embedding = "lora_embedding_A" in parts
    stem = "lora_embedding_" if embedding else "lora_"
    low, high = parts[f"{stem}A"], parts[f"{stem}B"]
    across = embedding or is_transposed(module, path)
    dims = weight.dims[::-1] if across else weight.dims
    check_base(dims == (high.dims[0], low.dims[1]), adapter, name, (high.dims[0], low.dims[1])[:: -1 if across else 1],
                {name: weight})  # fmt: skip
    factor = np.float32(adapter.scaling[path] * adapter.share)
    if across:
        weight, original = transposed(weight, name), transposed(original, name)
    length = parts.get("lora_magnitude_vector")
    added = _Product(low, high, factor).added_to
    if length is None:
        made = added(weight)
    else:
        check_base(length.size == high.dims[0], adapter, name, length.dims, {name: weight})
        made = scaled(added(weight), _gains(added(original), length), name)
    return transposed(made, name) if across else made


def is_transposed(module: torch.nn.Module, path: str) -> bool:
    """Whether a layer's weight is [inputs, outputs], as GPT-2's are."""
    return isinstance(dict(module.named_modules()).get(path), Conv1D)


@dataclasses.dataclass(frozen=True)
class _Product:
    """`factor * high @ low` for low [rank, in] and high [out, rank]."""

    low: LazyWeight
    high: LazyWeight
    factor: np.float32

    def added_to(self, weight: LazyWeight) -> LazyWeight:
        low, high, factor = self.low, self.high, self.factor
        return LazyWeight(
            weight.name, weight.dims, weight.dtype,
            rows=lambda a, b: weight.rows(a, b) + factor * (high.rows(a, b) @ low.numpy()),
            columns=lambda a, b: weight.columns(a, b) + factor * (high.numpy() @ low.columns(a, b)),
        )  # fmt: skip


def gains_of(adapter: Adapter, path: str, weight: LazyWeight) -> LazyWeight:
    """DoRA's factor of each output, [outputs]: the stored length over that of the changed row.

    Args:
        adapter: An adapter with lengths for the layer.
        path: The layer's name.
        weight: The base's weight, [outputs, inputs].
    """
    parts = adapter.layers[path]
    length = parts["lora_magnitude_vector"]
    factor = np.float32(adapter.scaling[path] * adapter.share)
    measured = _Product(parts["lora_A"], parts["lora_B"], factor).added_to(weight)
    return _gains(measured, length)


def _gains(measured: LazyWeight, length: LazyWeight) -> LazyWeight:
    def rows(start: int, stop: int) -> np.ndarray:
        spans = ((first, min(first + ROWS, stop)) for first in range(start, stop, ROWS))
        norms = [np.linalg.norm(measured.rows(*span), axis=1) for span in spans]
        return np.asarray(length.numpy().reshape(-1)[start:stop] / np.concatenate(norms), np.float32)

    return LazyWeight(measured.name, (length.size,), measured.dtype, rows)


def _sum(weight: LazyWeight, other: LazyWeight, factor: float) -> LazyWeight:
    return LazyWeight(
        weight.name, weight.dims, weight.dtype,
        lambda a, b: np.asarray(weight.rows(a, b) + np.float32(factor) * other.rows(a, b), np.float32),
    )  # fmt: skip
