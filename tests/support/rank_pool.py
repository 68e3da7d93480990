"""A program for several ranks: rows over one pool of blocks of a cut bundle. The first rank writes their logits.

mpiexec -n N python rank_pool.py CUT IDS.npy OUT.npz
"""

import numpy as np
from support.rank_program import run

from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.paged import PagedBatch


def steps(engine: Engine, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Logits of rows that share a beginning, part, wait in a file, and go on in another pool and a row of its own."""
    batch = engine.new_pool(3, len(ids) + 8, 0)
    assert isinstance(batch, PagedBatch), "blocks are not used"
    first, second, _ = (batch.add() for _ in range(3))
    batch.run([(0, ids[:-4])])
    second.copy_from(first)
    shared = batch.nbytes
    batch.run([(0, ids[-4:-3]), (1, ids[-3:-2]), (2, ids[:9])])  # the second row writes into a block of both
    found = {"parted": batch.logits, "blocks": np.array([shared, batch.nbytes])}
    kept = first.cache.swapped_out(engine.bundle.kv_cache)
    first.cache.clear()
    batch.run([(2, ids[9:])])  # takes the blocks
    first.cache.copy_from(kept, kept.length)
    batch.run([(0, ids[-1:]), (1, ids[-2:])])
    found["back"] = np.stack([first.logits, second.logits])
    found["ahead"] = np.concatenate(batch.decode_ahead([(2, ids[:2])]))
    other = engine.new_pool(1, len(ids) + 8, 0)
    state, alone = other.add(), engine.new_state(len(ids) + 8)
    state.cache.copy_from(second.cache, second.cache.length)
    alone.cache.copy_from(second.cache, second.cache.length)
    other.run([(0, ids[:1])])
    return found | {"moved": state.logits.copy(), "alone": engine.decode(alone, int(ids[0])).copy()}


if __name__ == "__main__":
    run(steps)
