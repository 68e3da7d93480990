"""Compares a bundle with another one at long context.

    python samples/long_context.py out/int8 out/fp32 --text book.txt

For a bundle with an int8 KV cache against the same model with a float cache. Three comparisons over one long part of
the text, each as one line of JSON:

- `decode`: all but the last tokens as a prompt, the last ones fed one by one. KL divergence from the reference's
  predictions, and the share of positions with the same most likely token.
- `prefill`: the same, with the last ones fed in small chunks through the prefill graph; the end of each chunk counts.
- `facts`: sentences are put at the beginning, and the beginning of each is repeated at the end. What both bundles write
  next shows whether they still recall it. A small model may miss some with a float cache, too.

With `--speed` only `steps`: both are open, and decode the last tokens in turns, token by token, so that a busy machine
slows both alike. Milliseconds of a step, medians, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satchel.runtime import Engine, open_bundle
from satchel.runtime.generation.tokenizer import Tokenizer

FACTS = (
    ("The name of the lighthouse keeper's dog was", " Barnaby"),
    ("The number painted on the green door is", " 7351"),
    ("The old ship that never came back was called the", " Marigold"),
    ("The password for the wine cellar is", " turpentine"),
)
CHUNK = 8
ANSWER = 6  # tokens


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def predictions(engine: Engine, ids: list[int], last: int, step: int) -> list[NDArray[np.float32]]:
    """The logits after each `step` of the `last` tokens: by decode for a step of 1, by prefill otherwise."""
    state = engine.new_state(len(ids))
    engine.prefill(state, ids[:-last])
    rows = []
    for start in range(len(ids) - last, len(ids), step):
        logits = engine.decode(state, ids[start]) if step == 1 else engine.prefill(state, ids[start : start + step])
        rows.append(logits.copy())  # the state writes the next ones over it
    return rows


def divergence(found: list[NDArray[np.float32]], wanted: list[NDArray[np.float32]]) -> dict[str, float]:
    """Mean KL(wanted || found), and how often the most likely token is the same."""
    total, agree = 0.0, 0
    for ours, theirs in zip(map(log_probabilities, found), map(log_probabilities, wanted), strict=True):
        total += float((np.exp(theirs) * (theirs - ours)).sum())
        agree += int(ours.argmax() == theirs.argmax())
    return {"mean_kl": total / len(wanted), "top_1": agree / len(wanted), "positions": len(wanted)}


def answers(engine: Engine, tokenizer: Tokenizer, ids: list[int], tokens: int) -> list[str]:
    """What the bundle writes after the repeated beginning of each fact, the facts standing `tokens` before."""
    planted = list(tokenizer.encode(" ".join(f"{start}{end}." for start, end in FACTS) + "\n\n"))
    filler = ids[: tokens - len(planted) - 32 - ANSWER]  # 32: room for the question
    said = []
    for start, _ in FACTS:
        state = engine.new_state(tokens)
        logits = engine.prefill(state, [*planted, *filler, *tokenizer.encode("\n\n" + start)])
        answer: list[int] = []
        while len(answer) < ANSWER:
            answer.append(int(logits.argmax()))
            logits = engine.decode(state, answer[-1])
        said.append(tokenizer.decode(answer))
    return said


def measure(
    bundle: Path, text: str, tokens: int, last: int
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]], list[str]]:
    """Decode's and prefill's predictions, and the answers, of one bundle."""
    engine = Engine.open(open_bundle(bundle), threads=2)
    tokenizer = Tokenizer.open(engine.bundle)
    tokens = min(tokens, engine.max_context)
    ids = list(tokenizer.encode(text))[:tokens]
    if len(ids) <= last:
        raise SystemExit(f"the text has {len(ids)} tokens: give one of more than {last}, or a smaller --last")
    said = answers(engine, tokenizer, ids, len(ids)) if len(ids) > 256 else []
    return predictions(engine, ids, last, 1), predictions(engine, ids, last, CHUNK), said


def steps(bundles: list[Path], text: str, tokens: int, last: int) -> dict[str, float]:
    """Decode steps of both bundles in turns."""
    engines = [Engine.open(open_bundle(bundle), threads=2) for bundle in bundles]
    ids = list(Tokenizer.open(engines[0].bundle).encode(text))[: min(tokens, engines[0].max_context)]
    states = [engine.new_state(len(ids)) for engine in engines]
    for engine, state in zip(engines, states, strict=True):
        engine.prefill(state, ids[:-last])
    taken = np.empty((last, 2))
    for step, token in enumerate(ids[-last:]):
        for index, (engine, state) in enumerate(zip(engines, states, strict=True)):
            start = time.perf_counter()
            engine.decode(state, token)
            taken[step, index] = time.perf_counter() - start
    bundle, reference = 1e3 * np.median(taken, axis=0)
    return {"bundle_ms": bundle, "reference_ms": reference, "ratio": float(np.median(taken[:, 1] / taken[:, 0]))}


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two bundles of one model far into a text.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="a long text, UTF-8")
    parser.add_argument("--tokens", type=int, default=4096, help="how much of it (default: 4096)")
    parser.add_argument("--last", type=int, default=256, help="how many positions at its end count (default: 256)")
    parser.add_argument("--speed", action="store_true", help="time decode steps instead")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    if options.speed:
        print(json.dumps({"steps": steps([options.bundle, options.reference], text, options.tokens, options.last)}))
        return
    theirs = measure(options.reference, text, options.tokens, options.last)  # one bundle in memory at a time
    ours = measure(options.bundle, text, options.tokens, options.last)
    print(json.dumps({"decode": divergence(ours[0], theirs[0])}))
    print(json.dumps({"prefill": divergence(ours[1], theirs[1])}))
    facts = zip(FACTS, ours[2], theirs[2], strict=False)
    print(json.dumps({"facts": [{"fact": s + e, "bundle": a, "reference": b} for (s, e), a, b in facts]}))


if __name__ == "__main__":
    main()
