"""A program for several ranks: runs the operators by which they exchange numbers, and compares them with numpy.

mpiexec -n N python rank_exchanges.py
"""

import numpy as np
from mpi4py import MPI
from support.kernels import operator_session

from satchel.runtime.execution.ranks import wire

SHAPES = ((1, 1, 37), (1, 700, 300), (2, 3, 5), (1, 2, 150_000))
"""Of the whole. Some have more rows, or longer ones, than a mailbox takes."""


def run(name: str, own: np.ndarray, inputs: dict[str, np.ndarray]) -> np.ndarray:
    feeds = {"x": own, **inputs}
    found: np.ndarray = operator_session(name, {}, list(feeds), feeds, {}).run(None, feeds)[0]
    return found


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
    print(f"rank {rank} is right")


if __name__ == "__main__":
    main()
