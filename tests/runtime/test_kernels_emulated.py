"""AVX-VNNI, which this processor may lack: with AVX2's instructions in its place, it gives the bits of all sets."""

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
from support.kernels import Product, needs_kernels

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
]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """tests/support/emulated_sets.c, compiled without the optimizations that take minutes."""
    made = tmp_path_factory.mktemp("emulated") / "emulated.so"
    options = ["-O1", "-std=gnu11", "-ffp-contract=off", "-fPIC", "-shared", "-fvisibility=hidden"]
    sources = [f"-I{ROOT / 'runtime' / 'kernels'}", str(ROOT / "tests" / "support" / "emulated_sets.c")]
    subprocess.run([str(COMPILER), *options, *sources, "-o", made, "-lm", "-lpthread"], check=True)
    library = ctypes.CDLL(str(made))
    library.run_linear.argtypes = [ctypes.c_int64 * 8, ctypes.c_float, ctypes.c_void_p * 8]
    return library


def run(library: ctypes.CDLL, product: Product, feeds: Mapping[str, NDArray[Any]], seed: int) -> NDArray[np.float32]:
    """What the emulated set gives for `feeds` and the constants of a seed."""
    single, rows = feeds["x"].shape[-2] == 1, feeds["x"].size // product.inputs
    operands = {**product.constants(seed), **feeds}
    y = np.full((*feeds["x"].shape[:-1], product.width), np.nan, np.float32)
    pointers = [operands[name].ctypes.data if name in operands else None for name in ("x", "codes", "scales", *"zbrg")]
    gate = GATES.index(product.gate)
    numbers = [product.inputs, product.block, product.hadamard, product.outputs, product.bits, gate, rows, single]
    values = (ctypes.c_void_p * 8)(*pointers, y.ctypes.data)
    assert library.run_linear((ctypes.c_int64 * 8)(*map(int, numbers)), product.epsilon, values) == 0
    return y


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_it_gives_the_bits_of_the_sets_that_are_here(emulated: ctypes.CDLL, product: Product) -> None:
    for rows, single in ((13, False), (101, False), (1, True), (5, True)):
        feeds = product.feeds(rows, seed=rows, single=single)
        wanted = product.session(0, feeds).run(None, feeds)[0]
        np.testing.assert_array_equal(run(emulated, product, feeds, 0), wanted)


def test_the_largest_products_do_not_saturate(emulated: ctypes.CDLL) -> None:
    """255 * 127, 1,024 times, is what 16 bits would cut."""
    product = Product(1024, 16)
    feeds = {"x": np.full((1, 7, 1024), 127, np.float32)}
    constants = product.constants(0) | {"codes": np.full((1, 1024 * 16), 255, np.uint8)}
    operands = [feeds["x"], constants["codes"], constants["scales"]]
    y = np.empty((1, 7, 16), np.float32)
    values = (ctypes.c_void_p * 8)(*(each.ctypes.data for each in operands), None, None, None, None, y.ctypes.data)
    assert emulated.run_linear((ctypes.c_int64 * 8)(1024, 0, 0, 16, 8, 0, 7, 0), 0.0, values) == 0
    wanted = 1024 * 127.0 * 127 * constants["scales"].reshape(16).astype(np.float64)
    np.testing.assert_allclose(y, np.broadcast_to(wanted, y.shape), rtol=1e-6)
