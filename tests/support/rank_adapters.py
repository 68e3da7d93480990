"""A program for several ranks: feeds ids to a cut bundle with each of its adapters and without one, and the first rank
writes what comes out to a file.

mpiexec -n N python rank_adapters.py CUT IDS.npy OUT.npz
"""

import numpy as np
from support.rank_program import run

from satchel.runtime.execution.engine import Engine

STEPS = 12


def steps(engine: Engine, ids: list[int]) -> dict[str, np.ndarray]:
    """For the base ("") and each adapter: logits of a prompt and of greedy steps, those tokens, and the scores; and
    the logits of rows that have all of them, decoded together."""
    names, found = [None, *(spec.name for spec in engine.bundle.manifest.adapters)], dict[str, np.ndarray]()
    batch = engine.new_batch(len(names), len(ids) + 1, force=True)
    for name in names:
        state = engine.new_state(len(ids) + STEPS, name)
        logits, tokens = [engine.prefill(state, ids).copy()], []
        for _ in range(STEPS):
            tokens.append(int(logits[-1].argmax()))
            logits.append(engine.decode(state, tokens[-1]).copy())
        label = name or ""
        found |= {f"{label}.logits": np.array(logits), f"{label}.tokens": np.array(tokens)}
        found[f"{label}.score"] = engine.score(ids, adapter=name)
        engine.prefill(batch.add(name), ids)
    batch.decode([int(logits.argmax()) for logits in batch.logits])
    return found | {"together": batch.logits.copy()}


if __name__ == "__main__":
    run(lambda engine, ids: steps(engine, ids.tolist()))
