"""Each model traced once for all tests of a run: most exports of a test only read a tiny model that others read too.

Tracing is most of what an export of a tiny model costs. The tracer reads no weights, so that checkpoints of one config
have one trace, whatever their weights, precision and target.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from support.shared import made_once
from torch.onnx._internal.exporter._registration import ONNXRegistry

from satchel.export.tracing.bind import PREFIX
from satchel.export.tracing.trace import Trace

Tracer = Callable[..., Trace]
UNREAD = {
    "_name_or_path", "name_or_path", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip
"""What a model and its config say that no logits hang on: of files, of stored weights, and of special tokens."""


def traced_once(places: pytest.TempPathFactory, tracer: Tracer) -> Tracer:
    """`tracer`, which keeps what it traced of transformers' own classes; a module of another class is always traced."""

    def trace(
        module: torch.nn.Module, name: str, capacity: int, protocol: bool = False, *, hidden: bool = False
    ) -> Trace:
        if protocol or not type(module).__module__.startswith("transformers."):
            return tracer(module, name, capacity, protocol, hidden=hidden)
        key = f"trace-{identity(module)}-{capacity}-{hidden}"
        return _load(
            made_once(places, key, lambda folder: _save(tracer(module, name, capacity, hidden=hidden), folder))
        )

    return trace


def translations_read_once(patch: pytest.MonkeyPatch) -> None:
    """Let torch parse the source of its translations to ONNX once for each process, and not for each trace."""
    read = functools.cache(ONNXRegistry.from_torchlib)

    def from_torchlib(opset_version: int) -> ONNXRegistry:
        found = copy.copy(read(opset_version))
        found.functions = {name: list(each) for name, each in found.functions.items()}
        return found

    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))


def identity(module: Any) -> str:
    """A digest of all that a tracer reads: classes, config, plain attributes, functions, shapes, ties, and buffers."""
    digest = hashlib.sha256(repr(module).encode())

    def add(*facts: object) -> None:
        digest.update(repr(facts).encode())

    add(sorted((name, value) for name, value in vars(module.config).items() if name not in UNREAD))
    for part in module.modules():
        add(type(part))
        for name, value in sorted(vars(part).items()):
            if name in UNREAD:
                continue
            if isinstance(value, bool | int | float | str | tuple | None):
                add(name, value)
            elif callable(value):
                add(name, getattr(value, "__module__", ""), getattr(value, "__qualname__", repr(value)))
    numbers: dict[int, int] = {}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        add(name, tensor.shape, tensor.dtype, tensor.device, numbers.setdefault(id(tensor), len(numbers)))
    for name, tensor in module.named_buffers():
        add(name, tensor.shape, tensor.dtype, tensor.device)
        if tensor.device.type != "meta":
            add(tensor.tolist())
    return digest.hexdigest()[:32]


def _save(trace: Trace, folder: Path) -> None:
    """A file holds an initializer without values as a further input of the graph."""
    graph, names = trace.model.graph, list(trace.constants)
    empty = [v for v in graph.initializers.values() if str(v.name).startswith(PREFIX) or v.name in trace.constants]
    for value in empty:
        graph.initializers.pop(str(value.name))
        value.const_value = None
        graph.inputs.append(value)
    ir.save(trace.model, folder / "model.onnx")
    np.savez(folder / "constants.npz", **{str(number): trace.constants[name] for number, name in enumerate(names)})
    (folder / "facts.json").write_text(json.dumps({"empty": len(empty), "constants": names}))


def _load(folder: Path) -> Trace:
    model, facts = ir.load(folder / "model.onnx"), json.loads((folder / "facts.json").read_text())
    inputs = model.graph.inputs
    for value in inputs[len(inputs) - facts["empty"] :]:
        inputs.remove(value)
        model.graph.initializers[str(value.name)] = value
    with np.load(folder / "constants.npz") as file:
        constants = {name: file[str(number)] for number, name in enumerate(facts["constants"])}
    return Trace(model, constants)
