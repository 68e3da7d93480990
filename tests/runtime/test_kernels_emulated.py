"""AVX-VNNI and AMX, which this processor may lack: with others in their place, linear layers give the bits of all sets.

Attention on AMX's tiles is compared with numpy's float64.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.attention_node import PASTS, SCALES, Array, Step, over
from support.attention_steps import AMX_PRECISION, PROMPTS
from support.kernels import Product, needs_kernels, operator_session

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("gcc") or shutil.which("clang")
GATES = ("", "silu", "gelu", "gelu_tanh", "relu")

pytestmark = [
    needs_kernels,
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="needs x86-64 and a C compiler"),
]

PRODUCTS = [
    Product(96, 64, epsilon=1e-5, optional="gbr"),
    Product(30, 50),
    Product(256, 16, hadamard=256),
    Product(40, 2 * 37, gate="gelu_tanh", optional="br"),
    Product(128, 2 * 64, gate="silu"),
    Product(128, 50, block=64),
    Product(128, 50, block=32, optional="z"),
    Product(128, 50, bits=4, block=64, optional="b"),
    Product(96, 2 * 50, bits=4, block=16, gate="silu", hadamard=32, optional="zr"),
    Product(192, 33, bits=4, block=8, epsilon=1e-5, optional="zg"),
    Product(144, 2 * 16, block=72, gate="silu"),
    Product(192, 48, bits=4, block=96, optional="zbr"),
    Product(256, 96, bits=4, block=256, hadamard=64),
    Product(512, 16, bits=4, block=512, optional="z"),
    Product(104, 70, block=104, optional="z"),
    Product(128, 50, bits=4, block=64, half_scales=True),
]


@pytest.fixture(scope="module", params=["AVXVNNI", "AMX"])
def emulated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """tests/support/emulated_sets.c, compiled without the optimizations that take minutes."""
    made = tmp_path_factory.mktemp("emulated") / "emulated.so"
    options = ["-O1", "-std=gnu11", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"]
    options.append(f"-D{request.param}")
    sources = [f"-I{ROOT / 'runtime' / 'kernels'}", str(ROOT / "tests" / "support" / "emulated_sets.c")]
    subprocess.run([str(COMPILER), *options, *sources, "-o", made, "-lm", "-lpthread"], check=True)
    library = ctypes.CDLL(str(made))
    library.tiles = request.param == "AMX"
    library.run_linear.argtypes = [ctypes.c_int64 * 10, ctypes.c_float, ctypes.c_void_p * 9]
    library.run_attention.argtypes = [ctypes.c_int64 * 12, ctypes.c_float, ctypes.c_float, ctypes.c_void_p * 12]
    library.run_table.argtypes = [ctypes.c_int64 * 4, ctypes.c_void_p * 4]
    return library


def run(library: ctypes.CDLL, product: Product, feeds: Mapping[str, NDArray[Any]], seed: int) -> NDArray[np.float32]:
    """What the emulated set gives for `feeds`, with row offsets `o` if there are any, and the constants of a seed."""
    single, rows = feeds["x"].shape[-2] == 1, feeds["x"].size // product.inputs
    operands = {**product.constants(seed), **feeds}
    y = np.full((*feeds["x"].shape[:-1], product.width), np.nan, np.float32)
    pointers = [operands[name].ctypes.data if name in operands else None for name in ("x", "codes", "scales", *"zbrgo")]
    gate, sequences = GATES.index(product.gate), len(feeds["o"]) - 1 if "o" in feeds else 0
    numbers = [
        product.inputs,
        product.block,
        product.hadamard,
        product.outputs,
        product.bits,
        gate,
        rows,
        single,
        sequences,
        product.half_scales,
    ]
    values = (ctypes.c_void_p * 9)(*pointers, y.ctypes.data)
    assert library.run_linear((ctypes.c_int64 * 10)(*map(int, numbers)), product.epsilon, values) == 0
    return y


def tile_products(library: ctypes.CDLL) -> int:
    return ctypes.c_int64.in_dll(library, "tile_products").value


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_it_gives_the_bits_of_the_sets_that_are_here(emulated: ctypes.CDLL, product: Product) -> None:
    for rows, single in ((7, False), (13, False), (40, False), (200, False), (1, True), (5, True), (29, True)):
        feeds = product.feeds(rows, seed=rows, single=single)
        wanted = product.session(0, feeds).run(None, feeds)[0]
        np.testing.assert_array_equal(run(emulated, product, feeds, 0), wanted)


@pytest.mark.parametrize(("inputs", "outputs", "block"), [(576, 300, 64), (96, 40, 32), (256, 513, 128)])
@pytest.mark.parametrize("rows", [1, 3, 9, 120])
def test_a_table_gets_the_bits_of_the_sets_that_are_here(
    emulated: ctypes.CDLL, inputs: int, outputs: int, block: int, rows: int
) -> None:
    rng = np.random.default_rng(rows)
    operands = {
        "x": rng.standard_normal((rows, inputs), np.float32),
        "codes": rng.integers(0, 256, (outputs, inputs // block, block), np.uint8),
        "scales": rng.uniform(0.001, 0.011, (outputs, inputs // block)).astype(np.float32),
    }
    attributes = {"inputs": inputs, "outputs": outputs, "block": block}
    wanted = operator_session("TableLinear", attributes, [*operands], operands, {}).run(None, operands)[0]
    y = np.full((rows, outputs), np.nan, np.float32)
    values = (ctypes.c_void_p * 4)(*(each.ctypes.data for each in operands.values()), y.ctypes.data)
    assert emulated.run_table((ctypes.c_int64 * 4)(inputs, block, outputs, rows), values) == 0
    np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("product", [Product(96, 2 * 32, gate="silu"), Product(128, 48, bits=4, block=64)], ids=str)
def test_sequences_of_one_and_of_several_tokens(emulated: ctypes.CDLL, product: Product) -> None:
    offsets = np.cumsum([0, 40, *[1] * 11, 17, 1, 1, 210, 9], dtype=np.int32)
    feeds = product.feeds(int(offsets[-1]), seed=1) | {"o": offsets}
    names = [*product.names, *[""] * (7 - len(product.names)), "o"]
    wanted = operator_session("Linear", product.attributes, names, feeds, product.constants(0)).run(None, feeds)[0]
    np.testing.assert_array_equal(run(emulated, product, feeds, 0), wanted)


@pytest.mark.parametrize(
    ("product", "rows", "wanted"),
    [
        (Product(130, 48), 48, 3 * 3 * 3),  # tiles of rows, of inputs, and of outputs
        (Product(130, 48), 47, 3 * 3 * 3),
        (Product(130, 48), 35, 2 * 3 * 3),
        (Product(128, 32, bits=4, block=32), 16, 1 * 4 * 2),
        (Product(128, 32, block=128), 8, 1 * 2 * 2),
        (Product(144, 16, block=72), 16, 1 * 4 * 1),  # 36 inputs
        (Product(128, 32, block=128), 7, 0),
        (Product(128, 32, block=16), 16, 0),
        (Product(512, 32, bits=4, block=512), 16, 0),
    ],
    ids=str,
)
def test_tiles_multiply_many_rows(emulated: ctypes.CDLL, product: Product, rows: int, wanted: int) -> None:
    before = tile_products(emulated)
    run(emulated, product, product.feeds(rows, seed=0), 0)
    assert tile_products(emulated) - before == (wanted if emulated.tiles else 0)


def test_the_largest_products_do_not_saturate(emulated: ctypes.CDLL) -> None:
    """255 * 127, 1,024 times, is what 16 bits would cut."""
    product = Product(1024, 16)
    feeds = {"x": np.full((1, 17, 1024), 127, np.float32)}
    constants = product.constants(0) | {"codes": np.full((1, 1024 * 16), 255, np.uint8)}
    operands = [feeds["x"], constants["codes"], constants["scales"]]
    y = np.empty((1, 17, 16), np.float32)
    values = (ctypes.c_void_p * 9)(*(each.ctypes.data for each in operands), *[None] * 5, y.ctypes.data)
    assert emulated.run_linear((ctypes.c_int64 * 10)(1024, 0, 0, 16, 8, 0, 17, 0, 0, 0), 0.0, values) == 0
    wanted = 1024 * 127.0 * 127 * constants["scales"].reshape(16).astype(np.float64)
    np.testing.assert_allclose(y, np.broadcast_to(wanted, y.shape), rtol=1e-6)


def attended(library: ctypes.CDLL, step: Step, feeds: Mapping[str, Array]) -> Array:
    """y of the emulated set; the caches among `feeds` are written in place."""
    names = ("query", "key", "value", *SCALES, *PASTS, "seqlens_k", "cos", "sin", "rows")
    y = np.full_like(feeds["query"], np.nan)
    pointers = [feeds[name].ctypes.data if name in feeds else None for name in names]
    cache, total = ("float32", "float16", "int8").index(step.cache), int(feeds["total_sequence_length"])
    tables = feeds["cos"].shape[::-1] if "cos" in feeds else (0, 0)
    numbers = [len(y), y.shape[1], step.heads, step.kv_heads, step.head_dim, cache, feeds["past_key"].shape[2], total,
               *tables, step.interleaved, step.window]  # fmt: skip
    values = (ctypes.c_void_p * 12)(*pointers, y.ctypes.data)
    assert library.run_attention((ctypes.c_int64 * 12)(*map(int, numbers)), step.scale, step.softcap, values) == 0
    return y


@pytest.mark.parametrize("emulated", ["AMX"], indirect=True)
@pytest.mark.parametrize("step", PROMPTS.values(), ids=PROMPTS)
def test_attention_of_prompts_has_16_bits(emulated: ctypes.CDLL, step: Step) -> None:
    feeds = step.feeds()
    before = tile_products(emulated)
    y = attended(emulated, step, feeds)
    assert tile_products(emulated) > before
    wanted = over(step, feeds, *(feeds[name] for name in PASTS))
    assert np.abs(y - wanted).max() <= AMX_PRECISION * np.abs(wanted).max()


@pytest.mark.parametrize("emulated", ["AMX"], indirect=True)
@pytest.mark.parametrize("cache", ["float32", "float16", "int8"])
@pytest.mark.parametrize("window", [-1, 150])
def test_a_prompt_in_chunks_gets_the_bits_of_the_whole(emulated: ctypes.CDLL, cache: str, window: int) -> None:
    step = Step(tokens=300, rotary=64, window=window, cache=cache)
    feeds = step.feeds()
    whole = attended(emulated, step, {**feeds, **{name: feeds[name].copy() for name in PASTS}})
    found = []
    for start, end in ((0, 7), (7, 100), (100, 298), (298, 300)):
        part = {name: feeds[name][:, start:end].copy() for name in ("query", "key", "value")}
        part["seqlens_k"], part["total_sequence_length"] = np.asarray([end - 1], np.int32), np.asarray(end, np.int32)
        found.append(attended(emulated, step, feeds | part))
    assert np.array_equal(np.concatenate(found, axis=1), whole)
