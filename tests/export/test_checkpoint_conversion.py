"""Operations between stored tensors and parameters: each lazy form, and whole results where there is none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.checkpoints import tiny_model
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from satchel.export.checkpoint import conversion
from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight, from_array

GATE, UP, DOWN = (f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
RNG = np.random.default_rng(5)


def convert_with(
    monkeypatch: pytest.MonkeyPatch, converter: WeightConverter, stored: dict[str, np.ndarray]
) -> dict[str, LazyWeight]:
    """The weights of a tiny model whose architecture declares one converter."""
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda _: [converter])
    weights = {name: from_array(name, array) for name, array in stored.items()}
    return conversion.convert(tiny_model("llama"), weights, "folder")


def same(weight: LazyWeight, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(weight.numpy(), expected, strict=True)
    np.testing.assert_array_equal(weight.rows(1, 4), expected[1:4])
    np.testing.assert_array_equal(weight.columns(2, 5), expected[:, 2:5])


def deinterleaved(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array[0::2], array[1::2]])


@pytest.mark.parametrize(
    ("operations", "order"),
    [([Chunk(dim=0)], lambda a: a), ([Interleave(dim=0), Chunk(dim=0)], deinterleaved)],
    ids=["lazy", "whole"],
)
def test_a_fused_matrix_is_split(
    operations: list[ConversionOps], order: Callable[[np.ndarray], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = RNG.standard_normal((192, 64), dtype=np.float32)
    converter = WeightConverter("mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], operations)
    weights = convert_with(monkeypatch, converter, {"model.layers.0.mlp.gate_up.weight": fused})
    assert set(weights) == {GATE, UP}
    same(weights[GATE], order(fused)[:96])
    same(weights[UP], order(fused)[96:])
    same(weights[GATE], order(fused)[:96])


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_are_joined_in_the_declared_order(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = RNG.standard_normal((64, 96), dtype=np.float32)
    left, right = np.split(whole, 2, axis)
    patterns = ["mlp.right_down.weight", "mlp.left_down.weight"]
    converter = WeightConverter(patterns, "mlp.down_proj.weight", [Concatenate(dim=axis)])
    stored = {"model.layers.0.mlp.left_down.weight": right, "model.layers.0.mlp.right_down.weight": left}
    same(convert_with(monkeypatch, converter, stored)[DOWN], whole)


def test_a_stack_of_more_than_ten_parts_keeps_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = RNG.standard_normal((64, 96), dtype=np.float32)
    converter = WeightConverter("mlp.parts.*.row", "mlp.down_proj.weight", [MergeModulelist(dim=0)])
    stored = {f"model.layers.0.mlp.parts.{i}.row": parts[i] for i in range(64)}
    same(convert_with(monkeypatch, converter, stored)[DOWN], parts)


def test_an_operation_without_lazy_form_is_run_once_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    array = RNG.standard_normal((64, 96), dtype=np.float32)
    runs: list[str] = []
    original = Transpose.convert

    def counted(self: Transpose, input_dict: dict[str, list[torch.Tensor]], *args: object, **kwargs: object) -> object:
        runs.append(next(iter(input_dict.values()))[0].device.type)
        return original(self, input_dict, *args, **kwargs)

    monkeypatch.setattr(Transpose, "convert", counted)
    converter = WeightConverter("mlp.turned", "mlp.down_proj.weight", [Transpose(dim0=0, dim1=1)])
    weight = convert_with(monkeypatch, converter, {"model.layers.0.mlp.turned": array.T})[DOWN]
    assert runs == ["meta"]
    np.testing.assert_array_equal(np.concatenate(list(weight.blocks(4096))), array)
    assert runs == ["meta", "cpu"]


def test_sources_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    converter = WeightConverter(["mlp.a", "mlp.b"], "mlp.down_proj.weight", [Concatenate(dim=0)])
    stored = {f"model.layers.0.mlp.{part}": np.ones((2, width), np.float32) for part, width in (("a", 3), ("b", 4))}
    with pytest.raises(ExportError, match=r"folder: the tensors stored for .*down_proj\.weight do not fit together"):
        convert_with(monkeypatch, converter, stored)
