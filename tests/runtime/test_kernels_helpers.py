"""The threads that help with the work for one token (`runtime/kernels/helpers.h`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.kernels import Product, needs_kernels, operator_session

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("gcc") or shutil.which("clang")

PRODUCTS = [
    Product(96, 64, epsilon=1e-5, optional="gbr"),
    Product(40, 2 * 37, gate="gelu_tanh", optional="br"),
    Product(128, 50, block=32, optional="zr"),
    Product(128, 900, bits=4, block=64, optional="b", half_scales=True),
    Product(64, 20011),  # more panels than units
    Product(64, 2 * 10007, gate="silu", hadamard=64, optional="r"),
]


@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs Linux and a C compiler")
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_jobs_are_done_whether_helpers_are_in_time_or_stuck(tmp_path: Path, sanitizer: str) -> None:
    program, kernels = tmp_path / "program", ROOT / "runtime" / "kernels"
    sources = [str(ROOT / "tests" / "support" / "helpers_program.c"), str(kernels / "helpers.c")]
    options = ["-O1", "-std=gnu11", f"-fsanitize={sanitizer}", f"-I{kernels}", "-o", str(program), "-lpthread"]
    subprocess.run([str(COMPILER), *sources, *options], check=True)
    given = os.environ | {"TSAN_OPTIONS": "die_after_fork=0"}
    done = subprocess.run([str(program)], env=given, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_kernels
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
@pytest.mark.parametrize("helpers", [1, 4])
def test_a_row_gets_the_same_bits_with_helpers(product: Product, helpers: int) -> None:
    feeds = product.feeds(1, seed=5, single=True)
    (alone,) = product.session(0, feeds, threads=1).run(None, feeds)
    session = product.session(0, feeds, threads=1 + helpers)
    for _ in range(20):
        np.testing.assert_array_equal(session.run(None, feeds)[0], alone)


@needs_kernels
def test_helpers_do_not_read_weights_that_may_change() -> None:
    """Weights that are inputs of the graph are gone after a run, which helpers may outlast."""
    product = Product(96, 640)
    constants, feeds = product.constants(0), product.feeds(1, seed=5, single=True)
    given = feeds | constants
    session = operator_session("Linear", product.attributes, product.names, given, {}, threads=4)
    (alone,) = product.session(0, feeds, threads=1).run(None, feeds)
    for _ in range(50):
        copies = {name: values.copy() for name, values in given.items()}
        np.testing.assert_array_equal(session.run(None, copies)[0], alone)


@needs_kernels
def test_sessions_in_several_threads_get_their_own_results() -> None:
    """One of them has the helpers at a time."""
    products = [Product(96, 2000), Product(128, 1500, block=32), Product(64, 2 * 700, gate="silu")]
    feeds = [product.feeds(1, seed=each, single=True) for each, product in enumerate(products)]
    alone = [
        product.session(0, feed, threads=1).run(None, feed)[0] for product, feed in zip(products, feeds, strict=True)
    ]
    wrong: list[int] = []

    def run(each: int) -> None:
        session = products[each].session(0, feeds[each], threads=3)
        for _ in range(200):
            if not np.array_equal(session.run(None, feeds[each])[0], alone[each]):
                wrong.append(each)

    threads = [threading.Thread(target=run, args=(each,)) for each in range(len(products))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.fixture
def busy() -> Iterator[None]:
    """A process that keeps each CPU busy."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    yield
    for process in spinning:
        process.kill()
        process.wait()


@needs_kernels
@pytest.mark.usefixtures("busy")
def test_results_are_right_and_sessions_end_beside_busy_processes() -> None:
    product = Product(256, 1024)
    feeds = product.feeds(1, seed=5, single=True)
    (alone,) = product.session(0, feeds, threads=1).run(None, feeds)
    for _ in range(6):
        session = product.session(0, feeds, threads=3)
        for _ in range(30):
            np.testing.assert_array_equal(session.run(None, feeds)[0], alone)
        del session  # its kernels wait for helpers that are late
