"""Layers that are copies of an earlier one: the graph is the one that tracing each layer gives, node for node."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from support.families import COMMON, FAMILIES, Family, by_family, save

from satchel.export import ExportConfig
from satchel.export.compile import lower, open_source
from satchel.export.tracing import trace
from satchel.export.tracing.bind import bind
from satchel.export.tracing.same_layers import Kind, same_layers

NAMES = ["llama", "gemma2", "gpt2", "deepseek_v3", "qwen3_5_text", "lfm2", "bamba"]


def deeper(family: Family) -> Family:
    """The family with twice as many layers: what it says of each layer is said again."""
    count = {**COMMON, **family.options}["num_hidden_layers"]
    lists = {k: [*v, *v] for k, v in family.options.items() if isinstance(v, list | tuple) and len(v) == count}
    return dataclasses.replace(family, options={**family.options, **lists, "num_hidden_layers": 2 * count})


def graph(checkpoint: Path, context: int | None) -> ir.Model:
    """The graph that all phases share."""
    config = ExportConfig(Path("unused"), "fp32", max_context=context)
    opened = open_source(checkpoint, config)
    traced = trace.trace(opened.module, opened.name, config.context(opened.max_context))
    return lower(bind(traced, opened.weights, opened.name), opened, config)[0]


def structure(model: ir.Model) -> list[Any]:
    """All that a graph says but for the names of its nodes and values; initializers count by their numbers."""
    numbers: dict[ir.Value | None, Any] = {None: None}
    numbers |= {value: str(value.name) for value in model.graph.inputs}
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy()
        numbers[value] = (array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest())
    found: list[Any] = [sorted(map(str, (numbers[value] for value in model.graph.initializers.values())))]
    for node in model.graph:
        attributes = sorted((attribute.name, str(attribute.value)) for attribute in node.attributes.values())
        numbers |= {output: (len(found), number) for number, output in enumerate(node.outputs)}
        facts = [(str(output.shape), str(output.type)) for output in node.outputs]
        found.append((node.domain, node.op_type, [numbers[value] for value in node.inputs], attributes, facts))
    return [*found, [numbers[output] for output in model.graph.outputs]]


@pytest.mark.parametrize("name", by_family(NAMES, lambda name: name == "llama"))
def test_copies_are_what_the_tracer_writes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = deeper(FAMILIES[name])
    checkpoint, copies = save(family, tmp_path / "checkpoint"), 0

    def kinds(*arguments: Any) -> list[Kind]:
        nonlocal copies
        found = same_layers(*arguments)
        copies += sum(len(kind.offsets) for kind in found)
        return found

    monkeypatch.setattr(trace, "same_layers", kinds)
    copied = structure(graph(checkpoint, family.context))
    monkeypatch.setattr(trace, "same_layers", lambda *_: [])
    assert copied == structure(graph(checkpoint, family.context))
    assert copies


def test_copied_layers_have_their_parameters_again_after_the_trace(tmp_path: Path) -> None:
    family = deeper(FAMILIES["llama"])
    opened = open_source(save(family, tmp_path / "checkpoint"), ExportConfig(Path("unused"), "fp32"))
    before = dict(opened.module.named_parameters())
    trace.trace(opened.module, opened.name, 64)
    after = dict(opened.module.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
