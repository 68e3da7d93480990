"""Runs a new bundle before it is published. Only `satchel export` starts this, in a process without torch:

    python -m satchel.runtime.evaluation.selftest

A line on standard input then has in JSON the bundle's folder and the libraries of its operators.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.contract import ATTENTION_MASK, EMBED, HIDDEN_STATES, INPUT_IDS, LOGITS
from satchel.runtime.bundle.manifest import MANIFEST_NAME, Manifest
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, SatchelError
from satchel.runtime.execution.adapters import Adapters
from satchel.runtime.execution.engine import open_engine
from satchel.runtime.generation.tokenizer import Tokenizer
from satchel.runtime.ort.custom_ops import Custom, choose
from satchel.runtime.ort.session import SessionSettings, open_session

Cache = dict[str, NDArray[np.float32]]
Ids = NDArray[np.int64]
Compared = tuple[str, NDArray[np.float32], str, NDArray[np.float32]]
"""A phase and its logits; another phase, and its logits for the same tokens. Or hidden states, and those of one run."""

TOKENS = 6

TOLERANCE = 1e-3
"""Max difference between logits of the same tokens by two graphs, relative to the largest logit."""

HALF_TOLERANCE = 2e-2
"""The same for graphs that compute in float16, with 11 significant bits."""

ROUNDED_TOLERANCE = 0.5
"""The same for root mean squares, where phases quantize activations or caches differently. A router may then choose
another expert for a token; a wrong graph is further off. The certificate measures smaller differences.
"""

SPARE = 2
"""Free positions of the cache in graphs whose mask covers the whole cache."""


def selftest(folder: Path, libraries: tuple[Path, ...] = ()) -> None:
    """Check that all graphs run and agree, and that the tokenizer encodes its corpus as recorded.

    The logits of a few tokens must be the same from prefill and decode as from the score graph, without an adapter and
    with each. Dynamic graphs are opened one at a time, to save memory.

    Raises:
        BundleError: A check failed, or the logits are not finite.
    """
    bundle = Bundle(folder, Manifest.read(folder / MANIFEST_NAME))
    _check_graphs(choose(bundle, Custom(libraries)))
    if bundle.manifest.plain is not None:
        _check_graphs(choose(bundle, Custom(passes=False)))
    if bundle.manifest.tokenizer is not None:
        Tokenizer.open(bundle)  # checks itself against the recorded corpus


def _check_graphs(bundle: Bundle) -> None:
    folder = bundle.folder
    if bundle.manifest.static is not None:
        compared = _compared_static(bundle)
    else:
        adapters = None, *(adapter.name for adapter in bundle.manifest.adapters)
        compared = [each for adapter in adapters for each in _compared_dynamic(bundle, adapter)]
    rounded = bool(bundle.manifest.layers) or bundle.manifest.kv_cache.dtype == "int8"
    exact = HALF_TOLERANCE if bundle.manifest.kv_cache.dtype == "float16" else TOLERANCE
    for name, logits, other, whole in compared:
        if not np.isfinite(logits).all() or not np.isfinite(whole).all():
            raise BundleError(f"{folder}: the logits of the {name} graph are not finite: export in another precision")
        size = _root_mean_square if rounded else _largest
        error = size(logits - whole) / max(size(whole), 1e-30)
        if error > (ROUNDED_TOLERANCE if rounded else exact):
            raise BundleError(f"{folder}: the {name} graph differs from the {other} graph by {error:.2g} of the logits")


def _compared_dynamic(bundle: Bundle, adapter: str | None) -> list[Compared]:
    length = min(TOKENS, bundle.manifest.model.max_context)
    ids = _ids(bundle.manifest, length)[None]
    # A mask of the whole cache must be longer than the tokens, as it is in use.
    fixed = bundle.manifest.has_fixed_mask
    empty = _empty_cache(bundle.manifest, min(length + SPARE, bundle.manifest.model.max_context) if fixed else length)
    tensors = dict(Adapters(bundle).tensors(adapter))
    before = max(length - 1, 1)  # the tokens that decode finds in the cache, unless there is one token in all
    score, _ = _run(bundle, "score", ids, 0, empty | tensors)
    prefill, cache = _run(bundle, "prefill", ids[:, :before], 0, empty | tensors)
    decode, _ = _run(bundle, "decode", ids[:, -1:], length - 1, (cache if length > 1 else empty) | tensors)
    of = "" if adapter is None else f" with adapter {adapter}"
    compared = [
        (f"prefill{of}", prefill[-1], "score", score[before - 1]),
        (f"decode{of}", decode[-1], "score", score[-1]),
    ]
    if bundle.manifest.embeddings is not None:
        once, _ = _run(bundle, EMBED, ids, 0, empty | tensors)
        _, cache = _run(bundle, EMBED, ids[:, :-1], 0, empty | tensors) if length > 1 else (once, empty)
        pieces, _ = _run(bundle, EMBED, ids[:, -1:], length - 1, cache | tensors)
        compared.append((f"{EMBED}{of}", pieces[-1], f"whole {EMBED}", once[-1]))
    return compared


def _compared_static(bundle: Bundle) -> list[Compared]:
    """Compare score with each prefill graph, on as many tokens as it takes, and decode with prefill."""
    engine = open_engine(bundle, SessionSettings(lean=True))
    compared: list[Compared] = []
    for graph in bundle.manifest.static.prefill if bundle.manifest.static else ():
        ids = _ids(bundle.manifest, graph.tokens)
        whole = engine.prefill(engine.new_state(len(ids)), ids, graph.tokens).copy()
        compared.append(("score", engine.score(ids)[-1], "prefill", whole))
    ids = _ids(bundle.manifest, min(TOKENS, engine.max_context))
    whole = engine.prefill(engine.new_state(len(ids)), ids).copy()
    state = engine.new_state(len(ids))
    if len(ids) > 1:
        engine.prefill(state, ids[:-1])
    return [*compared, ("decode", engine.decode(state, int(ids[-1])), "prefill", whole)]


def _ids(manifest: Manifest, count: int) -> Ids:
    return np.asarray([(7 * i + 1) % manifest.model.vocab_size for i in range(count)], np.int64)


def _largest(values: NDArray[np.float32]) -> float:
    return float(np.abs(values).max())


def _root_mean_square(values: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(values).mean()))


def _empty_cache(manifest: Manifest, capacity: int) -> Cache:
    cache = {}
    for layer in manifest.kv_cache.layers:
        for name, _, width in layer.buffers:
            cache[name] = np.zeros((1, layer.kv_heads, capacity, width), manifest.kv_cache.dtype)
    return cache | {state.past: np.zeros((1, *state.shape), state.dtype) for state in manifest.states}


def _run(
    bundle: Bundle, phase: str, ids: NDArray[np.int64], past: int, cache: Cache
) -> tuple[NDArray[np.float32], Cache]:
    """The logits of `ids` [1, sequence], after `past` cached positions, and the new cache.

    The logits are [positions, vocabulary]: those of all in score, of the last one else. The graph of hidden states
    gives those in place of logits. `cache` may be followed by the tensors of an adapter.
    """
    session = open_session(bundle, phase, SessionSettings(lean=True))
    end = past + ids.shape[1]
    whole = phase == "decode" and bundle.manifest.has_fixed_mask
    mask = np.zeros((1, next(iter(cache.values())).shape[2] if whole else end), np.int64)
    mask[:, :end] = 1
    names = [output.name for output in session.get_outputs()]
    values = dict(zip(names, session.run(None, {INPUT_IDS: ids, ATTENTION_MASK: mask, **cache}), strict=True))
    layers = bundle.manifest.kv_cache.layers
    pairs = [(past, present) for layer in layers for past, present, _ in layer.buffers]
    pairs += [(state.past, state.present) for state in bundle.manifest.states]
    result = HIDDEN_STATES if phase == EMBED else LOGITS
    return values[result][0], {name: values[present] for name, present in pairs}


def main() -> int:
    line = sys.stdin.readline()
    if not line:
        return 1  # the export has ended
    folder, *libraries = map(Path, json.loads(line))
    try:
        selftest(folder, tuple(libraries))
    except SatchelError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
