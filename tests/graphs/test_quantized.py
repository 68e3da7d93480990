"""The layouts of quantized weights, checked by the operators that read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from support.codes import rounded, values
from support.graphs import build, normal, run, the

from satchel.graphs.ir.values import MICROSOFT, Builder, weight
from satchel.graphs.ir.weights import from_array, pack_rows, reshaped, stored
from satchel.graphs.quant.quantized import LAYOUT, QuantizedWeight, float_scales
from satchel.runtime.bundle.contract import Layout
from satchel.runtime.bundle.layouts import Weight, pack

OUTPUTS, INPUTS = 21, 96
WEIGHT = normal(1, OUTPUTS, INPUTS)
EVERY = [(bits, block, symmetric) for bits in (4, 8) for block in (16, 32, None) for symmetric in (True, False)]
IDS = [f"{bits} bits, {block or 'channel'}, {'symmetric' if s else 'zero points'}" for bits, block, s in EVERY]
each = pytest.mark.parametrize(("bits", "block", "symmetric"), EVERY, ids=IDS)
Make = Callable[[Builder, ir.Value], ir.Value]


def negated(make: Make) -> ir.Model:
    """(x) -> Neg(make(x)): a graph around what a test builds."""
    model = build("(float[rows,columns] x) => (float[?,?] y) { y = Neg(x) }")
    node = the(model, "Neg")
    node.replace_input_with(0, make(Builder(model, node), model.graph.inputs[0]))
    return model


def decoded(codes: QuantizedWeight) -> ir.Model:
    """A graph whose y [inputs, outputs] are minus the values of the codes by columns."""

    def make(builder: Builder, x: ir.Value) -> ir.Value:
        columns, scales, points = codes.columns()
        parts = [builder.initializer(columns), float_scales(builder, scales, "float_scales")]
        parts += [] if points is None else [builder.initializer(points)]
        block = codes.grid.scheme.block
        where = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
        return builder.value("DequantizeLinear", parts, "decoded", **where)

    return negated(make)


def multiplied(codes: QuantizedWeight, level: int) -> ir.Model:
    """A graph whose y are minus x times the values of the codes by rows."""
    block, bits = codes.grid.scheme.block or INPUTS, codes.grid.scheme.bits

    def make(builder: Builder, x: ir.Value) -> ir.Value:
        whole, *grid = codes.rows()
        by_block = reshaped(whole, (OUTPUTS, INPUTS // block, block * bits // 8), "blocks")
        parts = [None if part is None else builder.initializer(part) for part in (by_block, *grid)]
        numbers = {"bits": bits, "block_size": block, "K": INPUTS, "N": OUTPUTS, "accuracy_level": level}
        return builder.value("MatMulNBits", [x, *parts], "product", domain=MICROSOFT, **numbers)

    return negated(make)


@each
def test_columns_are_decoded_to_the_grid_s_values(bits: int, block: int | None, symmetric: bool) -> None:
    codes = rounded("w", WEIGHT, bits, block, symmetric)
    found = run(decoded(codes), {"x": np.zeros((1, 1), np.float32)})["y"]
    np.testing.assert_array_equal(-found.T, values(codes))


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_are_multiplied_as_the_grid_s_values(bits: int, block: int, symmetric: bool, level: int) -> None:
    codes = rounded("w", WEIGHT, bits, block, symmetric)
    # With one number in each row, rounding activations to 8 bits changes nothing.
    found = run(multiplied(codes, level), {"x": np.eye(INPUTS, dtype=np.float32)})["y"]
    np.testing.assert_allclose(-found.T, values(codes), rtol=1e-5, atol=1e-6)


@each
def test_codes_by_rows_can_be_unpacked(bits: int, block: int | None, symmetric: bool) -> None:
    codes = rounded("w", WEIGHT, bits, block, symmetric)
    by_row, scales, points = codes.rows()
    assert (by_row.dims, by_row.dtype) == ((OUTPUTS, INPUTS * bits // 8), ir.DataType.UINT8)
    packed = by_row.numpy()
    found = packed if bits == 8 else np.stack([packed & 15, packed >> 4], 2).reshape(OUTPUTS, INPUTS)
    np.testing.assert_array_equal(found.astype(np.int16) - ((1 << (bits - 1)) if symmetric else 0), codes.codes)
    np.testing.assert_array_equal(by_row.rows(3, 7), packed[3:7])
    np.testing.assert_array_equal(scales.numpy(), codes.grid.scales)
    assert (points is None) == symmetric


@pytest.mark.parametrize("layout", Layout)
def test_other_layouts_are_named_marked_and_made_as_the_bundle_format_says(layout: Layout) -> None:
    codes = rounded("w", WEIGHT, 8, None, symmetric=True)
    stored = Weight(codes.codes.T, codes.grid.scales.T, None, 8)
    wanted = pack(layout, stored)
    made = codes.derived(layout)
    assert [part.name for part in made] == [f"w{ending}" for ending in wanted]
    for part, array in zip(made, wanted.values(), strict=True):
        assert part.meta[LAYOUT] is layout
        assert (part.dims, part.dtype.numpy()) == (array.shape, array.dtype)
        np.testing.assert_array_equal(part.numpy(), array)
        np.testing.assert_array_equal(part.rows(1, 2), array[1:2])


@each
def test_bytes_are_counted_as_they_are_stored(bits: int, block: int | None, symmetric: bool) -> None:
    codes = rounded("w", normal(2, 24, 64), bits, block, symmetric)
    parts = [part for part in codes.columns() if part is not None]
    assert codes.nbytes == sum(part.nbytes for part in parts) == sum(len(part.tobytes()) for part in parts)


@pytest.mark.parametrize("size", [1, 40, 1000])
def test_four_bits_written_in_blocks_are_what_onnx_reads(tmp_path: Path, size: int) -> None:
    codes = rounded("w", WEIGHT, 4, 32, symmetric=False)
    model = decoded(codes)
    for index, value in enumerate(model.graph.initializers.values()):
        lazy = weight(value)
        if lazy is None:
            continue
        (tmp_path / f"{index}").write_bytes(b"".join(stored(block).tobytes() for block in lazy.blocks(size)))
        value.const_value = ir.ExternalTensor(
            f"{index}", 0, lazy.nbytes, lazy.dtype, shape=lazy.shape, name=lazy.name, base_dir=str(tmp_path)
        )
    ir.save(model, tmp_path / "graph.onnx")
    session = ort.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(["y"], {"x": np.zeros((1, 1), np.float32)})
    np.testing.assert_array_equal(-found.T, values(codes))


def test_rows_of_an_odd_number_of_four_bit_codes_end_on_a_byte() -> None:
    np.testing.assert_array_equal(pack_rows(np.asarray([[1, 2, 3], [4, 5, 6]], np.uint8), 4), [[0x21, 3], [0x54, 6]])


def test_another_shape_reads_the_same_rows() -> None:
    lazy = from_array("w", WEIGHT)
    stack = reshaped(lazy, (7, 3, 4, 24), "stack")
    np.testing.assert_array_equal(stack.numpy(), WEIGHT.reshape(7, 3, 4, 24))
    np.testing.assert_array_equal(stack.rows(2, 5), WEIGHT.reshape(7, 3, 4, 24)[2:5])
    assert stack.tobytes() == lazy.tobytes()
    assert (stack.base, reshaped(stack, (7, 288), "flat").base, lazy.base) == (lazy, lazy, lazy)


@pytest.mark.parametrize("shape", [(OUTPUTS, INPUTS + 1), (14, 144), (), (42, 48)], ids=str)
def test_a_shape_that_cuts_rows_is_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="cannot be read as"):
        reshaped(from_array("w", WEIGHT), shape, "v")
