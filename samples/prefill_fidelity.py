"""Compares the prefill of two bundles, with the kernels that this machine uses.

    python samples/prefill_fidelity.py out/int8 out/fp32 --text book.txt

`satchel eval` measures the score graph, which gives the logits of all positions at once; a specialized bundle may have
other kernels for prefill, and these give the last position's only. Here each window of the text is prefilled two tokens
at a time, and every second position counts: mean KL divergence from the reference's predictions, and the share of
positions with the same most likely token, as JSON on one line.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from satchel.runtime import Engine, open_bundle
from satchel.runtime.evaluation.fidelity import cut_windows, log_softmax, text_ids
from satchel.runtime.generation.tokenizer import Tokenizer

STEP = 2


def measure(found: Engine, wanted: Engine, text: str, tokens: int, windows: int, skip: int) -> dict[str, float]:
    """Mean KL(wanted || found) and agreement over positions from `skip` on of each window."""
    ids = text_ids(Tokenizer.open(wanted.bundle), text)
    divergences, agree = [], []
    for window in cut_windows(ids, tokens, windows):
        states = [engine.new_state(tokens) for engine in (found, wanted)]
        for start in range(0, tokens - 1, STEP):
            part = [int(token) for token in window[start : start + STEP]]
            ours, theirs = (
                log_softmax(engine.prefill(state, part)) for engine, state in zip((found, wanted), states, strict=True)
            )
            if start + STEP > skip:
                divergences.append(float((np.exp(theirs) * (theirs - ours)).sum()))
                agree.append(int(ours.argmax() == theirs.argmax()))
    return {"mean_kl": float(np.mean(divergences)), "top_1": float(np.mean(agree)), "positions": len(agree)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="of a window")
    parser.add_argument("--skip", type=int, default=32, help="positions at a window's start that do not count")
    args = parser.parse_args()
    found, wanted = (Engine.open(open_bundle(path)) for path in (args.bundle, args.reference))
    text = args.text.read_text(encoding="utf-8")
    print(json.dumps(measure(found, wanted, text, args.tokens, args.windows, args.skip)))


if __name__ == "__main__":
    main()
