"""A program for several ranks: feeds ids to a cut bundle, and the first rank writes the logits of each step to a file.

mpiexec -n N python rank_steps.py CUT IDS.npy OUT.npz
"""

import numpy as np
from support.rank_program import run

from satchel.runtime.execution.engine import Engine

CHUNK = 9


def steps(engine: Engine, ids: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Logits and tokens of `count` greedy steps after a prompt that is fed in chunks, and of the prompt at once."""
    state = engine.new_state(len(ids) + count + 1)
    logits, tokens = [engine.prefill(state, ids, CHUNK).copy()], []
    for _ in range(count):
        tokens.append(int(logits[-1].argmax()))
        logits.append(engine.decode(state, tokens[-1]).copy())
    batch = engine.new_batch(2, len(ids) + 1, force=True)
    for length in (len(ids), len(ids) - 3):
        engine.prefill(batch.add(), ids[:length])
    batch.decode(tokens[:2])
    together = batch.logits.copy()
    batch.copy(0, 1)
    return {
        "logits": np.array(logits), "tokens": np.array(tokens), "score": engine.score(ids), "together": together,
        "copied": batch.states[1].logits.copy(),
    }  # fmt: skip


if __name__ == "__main__":
    run(lambda engine, ids: steps(engine, ids, min(64, engine.bundle.manifest.model.max_context - len(ids) - 1)))
