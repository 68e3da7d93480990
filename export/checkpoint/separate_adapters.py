"""Adapters that are kept apart: their changes are marked on the weights of their base, which stay as they are."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from satchel.export.checkpoint.adapter_notes import notes_on_adapter
from satchel.export.checkpoint.adapters import CONFIG, Adapter, check_base, gains_of, is_transposed, read_adapter
from satchel.export.checkpoint.record import Checkpoint
from satchel.export.errors import ExportError
from satchel.graphs.ir.low_rank import CHANGES, Change, LowRank, changes_of
from satchel.graphs.ir.weights import LazyWeight, from_array, mapped, scaled, transposed

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ADVICE = "merge it: without --adapters separate"


def split_name(text: str | Path) -> tuple[str, Path]:
    """NAME=FOLDER as the name and the folder.

    Raises:
        ExportError: It has no name, or the name cannot be that of a file.
    """
    name, separator, folder = str(text).partition("=")
    if not separator or Path(text).is_dir():
        raise ExportError(f"--adapter {text}: --adapters separate takes NAME=FOLDER, such as style={text}")
    if not Path(folder).is_dir() and _is_number(folder):
        raise ExportError(
            f"--adapter {text}: {folder} is a share, which only merged adapters have: --adapters separate takes "
            "NAME=FOLDER"
        )
    if not _NAME.fullmatch(name):
        raise ExportError(
            f"--adapter {text}: {name!r} is not a name: give NAME=FOLDER, the name of up to 64 letters, digits, dots, "
            "dashes and underscores"
        )
    return name, Path(folder)


def keep_apart(checkpoint: Checkpoint, adapters: Sequence[str | Path]) -> Checkpoint:
    """Return the checkpoint with the changes of adapters, each NAME=FOLDER, as marks (`CHANGES`) on its weights.

    Raises:
        ExportError: One cannot be read, does not fit the checkpoint, or changes more than linear layers.
    """
    read: dict[str, Adapter] = {}
    for name, folder in map(split_name, adapters):
        if name.lower() in map(str.lower, read):
            raise ExportError(f"--adapter {name}={folder}: there are two adapters of this name: give one another name")
        read[name] = read_adapter(folder)
    found: dict[str, dict[str, LowRank]] = {}
    for name, adapter in read.items():
        for layer, change in _changes(name, adapter, checkpoint):
            found.setdefault(layer, {})[name] = change
    weights = dict(checkpoint.weights)
    for layer, parts in found.items():
        old = weights[f"{layer}.weight"]
        across = is_transposed(checkpoint.module, layer)
        new = LazyWeight(old.name, old.dims, old.dtype, old.rows, old.columns, computed=old.computed)
        new.meta |= old.meta
        new.meta[CHANGES] = (Change(layer, parts, 0, old.dims[1 if across else 0], transposed=not across),)
        weights[f"{layer}.weight"] = new
    sources = [path for adapter in read.values() for path in (adapter.folder / CONFIG, adapter.file)]
    notes = [note for adapter in read.values() for note in notes_on_adapter(adapter.folder, checkpoint)]
    return dataclasses.replace(
        checkpoint, weights=weights, sources=(*checkpoint.sources, *sources), notes=(*checkpoint.notes, *notes)
    )


def changes_in(checkpoint: Checkpoint) -> list[Change]:
    """What adapters that are kept apart change."""
    return [change for weight in checkpoint.weights.values() for change in changes_of(weight)]


def _changes(name: str, adapter: Adapter, checkpoint: Checkpoint) -> Iterator[tuple[str, LowRank]]:
    """What an adapter does to each layer.

    Raises:
        ExportError: It changes what is no linear layer, or has another form.
    """
    weights, where = checkpoint.weights, f"--adapter {name}={adapter.folder}"
    biases = {key.removesuffix(".bias"): value for key, value in adapter.replaced.items() if key.endswith(".bias")}
    whole = next((key for key in adapter.replaced if not key.endswith(".bias") or key in adapter.apart), None)
    if whole is not None:
        raise ExportError(f"{where}: it replaces {whole} as a whole, which cannot be kept apart; {_ADVICE}")
    for layer in {**adapter.layers, **biases}:
        key, parts = f"{layer}.weight", adapter.layers.get(layer, {})
        check_base(key in weights, adapter, key, (), weights)
        if "lora_embedding_A" in parts:
            raise ExportError(
                f"{where}: {layer} is an embedding, and only changes of linear layers are kept apart; {_ADVICE}"
            )
        if len(weights[key].dims) != 2:
            raise ExportError(
                f"{where}: {layer}.bias is not that of a linear layer and cannot be kept apart; {_ADVICE}"
            )
        tied = next((other for other in weights if other != key and weights[other] is weights[key]), None)
        if tied is not None:
            raise ExportError(f"{where}: {key} is {tied} too, and a change of one cannot be kept apart; {_ADVICE}")
        yield layer, _low_rank(layer, adapter, checkpoint, biases.get(layer))


def _low_rank(layer: str, adapter: Adapter, checkpoint: Checkpoint, replaced: LazyWeight | None) -> LowRank:
    """The product and bias of one layer; `replaced` is the bias that stands for the base's."""
    weight, parts = checkpoint.weights[f"{layer}.weight"], adapter.layers.get(layer)
    inputs, outputs = weight.dims if is_transposed(checkpoint.module, layer) else weight.dims[::-1]
    added, gain = list[LazyWeight](), None
    if replaced is not None:
        name = f"{layer}.bias"
        fits = name in checkpoint.weights and checkpoint.weights[name].dims == replaced.dims
        check_base(fits, adapter, name, replaced.dims, checkpoint.weights)
        added += [replaced, mapped(checkpoint.weights[name], np.negative, name)]
    if parts is None:
        empty = (np.zeros((inputs, 0), np.float32), np.zeros((0, outputs), np.float32))
        first, second = (from_array(layer, array) for array in empty)
    else:
        low, high, factor = parts["lora_A"], parts["lora_B"], np.float32(adapter.scaling[layer])
        dims = high.dims[0], low.dims[1]
        check_base(dims == (outputs, inputs), adapter, f"{layer}.weight", dims, checkpoint.weights)
        first, second = transposed(low, low.name), mapped(transposed(high, high.name), lambda b: b * factor, high.name)
        if "lora_B.bias" in parts:
            added.append(mapped(parts["lora_B.bias"], lambda b: b * factor, layer))
        length = parts.get("lora_magnitude_vector")
        if length is not None:
            check_base(length.size == outputs, adapter, f"{layer}.weight", length.dims, checkpoint.weights)
            across = is_transposed(checkpoint.module, layer)
            measure = functools.cache(gains_of(adapter, layer, transposed(weight, layer) if across else weight).numpy)
            gains = LazyWeight(layer, (outputs,), second.dtype, lambda a, b: measure()[a:b])
            gain, second = _row([gains], layer), scaled(second, gains, layer, -1)
    return LowRank(first, second, _row(added, layer) if added else None, gain)


def _row(vectors: Sequence[LazyWeight], name: str) -> LazyWeight:
    """The sum of vectors [outputs], as [1, outputs]."""

    def rows(start: int, stop: int) -> np.ndarray:
        return np.asarray(sum(vector.rows(start, stop) for vector in vectors), np.float32)

    whole = LazyWeight(name, vectors[0].dims, vectors[0].dtype, rows)
    return LazyWeight(name, (1, whole.size), whole.dtype, lambda a, b: whole.numpy()[None][a:b])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
