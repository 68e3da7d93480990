"""What the programs for several ranks share: the first rank runs steps and writes what comes out, the others follow."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.execution.engine import Engine, follow_rank, join_ranks
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.ort.session import SessionSettings


def run(steps: Callable[[Engine, NDArray[np.int64]], Mapping[str, NDArray[np.float32]]]) -> None:
    """Run a program with the arguments CUT IDS.npy OUT.npz: `steps` of the cut bundle's engine and the ids."""
    world = join_ranks(Path(sys.argv[1]))
    bundle = open_bundle(world.folder)
    if world.rank:
        follow_rank(world, bundle, SessionSettings(threads=1))
    else:
        result = steps(Engine.open(bundle, threads=1), np.load(sys.argv[2]))
        world.stop()
        np.savez(sys.argv[3], **result)
