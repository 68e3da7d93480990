"""A program for several ranks: runs the operators by which they exchange numbers, and compares them with numpy.

mpiexec -n N python rank_exchanges.py
"""

import os

import numpy as np
import onnx
import onnxruntime as ort
from mpi4py import MPI
from onnx import helper
from support.kernels import Product, found, operator_session

from satchel.graphs.shard.collectives import ALL_ROWS, NO_ROWS, OWN_ROWS
from satchel.runtime.execution.ranks import wire
from satchel.runtime.kernels.library import SWITCH, instruction_set, instruction_sets

SHAPES = ((1, 1, 37), (1, 700, 300), (2, 3, 5), (1, 2, 150_000))
"""Of the whole. Some have more rows, or longer ones, than a mailbox takes."""


def run(name: str, own: np.ndarray, inputs: dict[str, np.ndarray]) -> np.ndarray:
    feeds = {"x": own, **inputs}
    found: np.ndarray = operator_session(name, {}, list(feeds), feeds, {}).run(None, feeds)[0]
    return found


PRODUCTS = (
    Product(576, 64, epsilon=1e-5, optional="g"),
    Product(1536, 64, hadamard=128),
    Product(1000, 32),
    Product(640, 32, bits=4, block=32, optional="z"),
)


def check_rounded(product: Product, rank: int, ranks: int, tokens: int, whole: int, apart: bool) -> None:
    """Rows that ranks join and quantize give the bits of rows that one rank has in floats; `apart`: in two nodes.

    If nothing reads the joined rows, nothing is added to them either, and some have numbers that are not finite.
    """
    random = np.random.default_rng(tokens)
    x, residual = (random.standard_normal((1, tokens, product.inputs)).astype(np.float32) for _ in range(2))
    if whole == NO_ROWS:
        residual[:] = 0
        x[0, ::7, 1], x[0, ::9, -1] = np.nan, np.inf
    edges = np.arange(1, ranks) * product.inputs // ranks // 16 * 16
    widths, constants = np.diff([0, *edges, product.inputs]), product.constants(1)
    feeds = {"x": np.split(x, edges, -1)[rank], "widths": widths, "residual": residual, **constants}
    gain = "g" if "g" in feeds else ""
    if apart:
        reads = ["x", "widths", "residual", gain]
        nodes = [
            helper.make_node("RoundedGather", reads, ["joined", "rounded"], domain="satchel", whole=whole),
            helper.make_node("Linear", ["joined", *product.names[1:], "", "rounded"], ["y"], domain="satchel"),
        ]
    else:
        reads = [*product.names, "", "", "widths", "" if whole == NO_ROWS else "residual"]
        nodes = [helper.make_node("Linear", reads, ["y", "joined"], domain="satchel", whole=whole)]
    for node in nodes:
        node.attribute.extend(helper.make_attribute(name, value) for name, value in product.attributes.items())
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in feeds.items()
    ]
    outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("y", "joined")]
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("satchel", 1)]
    graph = helper.make_graph(nodes, "rounded", inputs, outputs)
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(found()))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    y, joined = ort.InferenceSession(model, options).run(None, feeds)
    alone = {"x": x + residual, **constants}
    (expected,) = operator_session("Linear", product.attributes, product.names, alone, {}).run(None, alone)
    np.testing.assert_array_equal(y, expected)
    if whole == ALL_ROWS:
        np.testing.assert_array_equal(joined, x + residual)


def main() -> None:
    world = MPI.COMM_WORLD
    wire.connect(MPI, world, (-1, -1))
    rank, ranks = world.Get_rank(), world.Get_size()
    for seed, shape in enumerate(SHAPES):
        random = np.random.default_rng(seed)
        all_sums = random.standard_normal((ranks, *shape)).astype(np.float32)
        whole, residual = (random.standard_normal(shape).astype(np.float32) for _ in range(2))
        edges = np.sort(random.choice(np.arange(1, shape[-1]), ranks - 1, replace=False))  # unequal parts
        own, widths = np.split(whole, edges, -1)[rank], np.diff([0, *edges, shape[-1]]).astype(np.int64)
        np.testing.assert_array_equal(run("AllGather", own, {"widths": widths}), whole)
        joined = run("AllGather", own, {"widths": widths, "residual": residual})
        np.testing.assert_array_equal(joined, whole + residual)
        gathered = run("GatherLogits", own, {"widths": widths})
        np.testing.assert_array_equal(gathered, whole if rank == 0 else 0 * whole)
        summed = run("AllReduce", all_sums[rank], {})
        np.testing.assert_allclose(summed, all_sums.sum(0, np.float64), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(world.bcast(summed, 0), summed)
    for product in PRODUCTS:
        for tokens in (1, 5, 100, 1001):
            for apart in (False, True):
                check_rounded(product, rank, ranks, tokens, OWN_ROWS if tokens == 100 else ALL_ROWS, apart)
    for name in sorted({"avx2"}.intersection(instruction_sets()) | {instruction_set()}):  # words, and bytes
        os.environ[SWITCH] = name
        instruction_set()
        for product in PRODUCTS:
            check_rounded(product, rank, ranks, 300, NO_ROWS, False)
    print(f"rank {rank} is right")


if __name__ == "__main__":
    main()
