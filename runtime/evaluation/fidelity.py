"""Measures how close the predictions of a bundle are to those of a reference, separately for prefill and decode.

The text is tokenized without special tokens and cut into consecutive windows. Each window is scored alone, and all its
positions but the first few count.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.certificate import PhaseFidelity, Window
from satchel.runtime.errors import BundleError, PromptError, SatchelError
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import Logits
from satchel.runtime.generation.tokenizer import Tokenizer

Ids = NDArray[np.int64]
Reference = Callable[[Ids], NDArray[np.float32]]
"""Token ids [sequence] -> the logits of every position, [sequence, vocabulary]."""


VALUES_AT_ONCE = 1 << 17
"""Logits converted to float64 at a time: intermediate results of 1 MiB stay in a processor's cache."""

LARGEST_LOSS = 700.0
"""Upper bound of a mean loss, in nats, so that the perplexity is a finite float64."""


@dataclass(frozen=True)
class Fidelity:
    """The figures of the score and prefill graphs, and those of the decode graph after a prefill."""

    prefill: PhaseFidelity
    decode: PhaseFidelity


def text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text without the special tokens that the tokenizer adds at its beginning and end.

    The special tokens are the encoding of the empty text, split where the ids of the text stop to agree with it.
    """
    ids, special = tokenizer.encode(text), tokenizer.encode("")
    before = next((i for i, token in enumerate(special) if i >= len(ids) or ids[i] != token), len(special))
    after = len(special) - before
    return ids[before : len(ids) - after]


def cut_windows(ids: Sequence[int], length: int = Window.LENGTH, count: int = Window.WINDOWS) -> list[Ids]:
    """The first `count` consecutive windows of `length` ids. A shorter rest is dropped, unless it is the whole text."""
    whole = np.asarray(ids, np.int64)
    windows = [whole[start : start + length] for start in range(0, len(whole) - length + 1, length)]
    return windows[:count] or [whole]


def check_windows(windows: Sequence[Ids], skip: int) -> None:
    """Raise PromptError for a window without a counted position that is followed by a token."""
    shortest = min((len(window) for window in windows), default=0)
    if shortest < skip + 2:
        raise PromptError(
            f"a window of {shortest} tokens is too short when {skip} are skipped: give at least {skip + 2} tokens"
        )


def evaluate(
    engine: Engine,
    windows: Sequence[Ids],
    reference: Reference | None,
    *,
    skip: int = Window.SKIP,
    decode_windows: int | None = None,
    decode_rows: int = 1,
    adapter: str | None = None,
    progress: Callable[[int], Any] = lambda tokens: None,
    together: int = 1,
    workers: int = 1,
) -> Fidelity:
    """Compare the predictions of a bundle with those of a reference, position by position.

    Prefill: logits of `Engine.score` from position `skip` on, and of the prefill graph for the last position of each
    window that decode is measured on. Decode: the first half of a window is prefilled and the second half, which
    counts, is decoded token by token. The divergence is KL(reference || bundle) over the whole vocabulary, in float64.
    The loss of a position is that of the next token, so the last position of a window has none. The logits of as many
    windows as there are `workers` are in memory, and the reference's of `together` times as many.

    Args:
        windows: Token ids, each at least `skip` + 2 of them.
        reference: Computes the logits to compare with; None to measure only perplexity.
        skip: Number of positions at the start of each window that do not count.
        decode_windows: Number of windows that decode is measured on; None for all.
        decode_rows: Rows that each decode a part of the second half of a window, after all that is before it was
            prefilled; together if that changes none of them. More than one are for graphs whose prefill and decode
            compute the same.
        adapter: The adapter to measure; None for the base model.
        progress: Called with the number of tokens of each finished window.
        together: Windows that decode in the rows of one batch: in one run of the graph if that changes none of them.
        workers: So many times `together` windows are measured at once, for an engine of one thread.

    Raises:
        PromptError: A window is too short or too long, an id is outside the vocabulary, or there is no such adapter.
        SatchelError: The reference has another vocabulary, or its logits are not finite.
        BundleError: The bundle's logits are not finite.
    """
    check_windows(windows, skip)
    if decode_windows is not None and decode_windows < 1:
        raise PromptError(f"decode cannot be measured on {decode_windows} windows: give at least 1")
    prefill, decode = _Figures("score and prefill graphs"), _Figures("decode graph")

    def measure(start: int) -> tuple[_Figures, _Figures]:
        rows = []
        for index, window in enumerate(windows[start : start + together], start):
            expected = None if reference is None else _checked(reference(window), window, engine)
            rows.append(_Row(window, expected, decode_windows is None or index < decode_windows))
        return _compare(engine, rows, skip, decode_rows, adapter)

    starts = range(0, len(windows), together)
    with ThreadPoolExecutor(workers) as pool:
        for start, found in zip(starts, pool.map(measure, starts), strict=True):
            prefill.extend(found[0])
            decode.extend(found[1])
            for window in windows[start : start + together]:
                progress(len(window))
    return Fidelity(prefill.summary(), decode.summary())


def log_softmax(logits: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Log-probabilities along the last axis, computed in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


class _Figures:
    """Collects four floats per position of one phase."""

    def __init__(self, graphs: str) -> None:
        self._graphs = graphs
        self._divergences, self._agreements = array("d"), array("d")
        self._losses, self._reference_losses = array("d"), array("d")

    def add(self, logits: Logits, expected: NDArray[np.float32] | None, following: Ids) -> None:
        """Add logits [positions, vocabulary] and the ids that follow, which the last position may lack."""
        step = max(1, VALUES_AT_ONCE // logits.shape[1])
        for start in range(0, len(logits), step):
            rows, targets = slice(start, start + step), following[start : start + step]
            if not np.isfinite(logits[rows]).all():
                raise BundleError(f"the logits of the {self._graphs} are not finite: export in another precision")
            ours = log_softmax(logits[rows])
            self._losses.extend(_losses(ours, targets))
            if expected is None:
                continue
            theirs = log_softmax(expected[rows])
            self._reference_losses.extend(_losses(theirs, targets))
            self._agreements.extend(ours.argmax(-1) == theirs.argmax(-1))
            difference = theirs - ours
            self._divergences.extend(np.einsum("pv,pv->p", np.exp(theirs, out=theirs), difference))

    def extend(self, others: _Figures) -> None:
        """Add the positions of others."""
        self._divergences += others._divergences
        self._agreements += others._agreements
        self._losses += others._losses
        self._reference_losses += others._reference_losses

    def summary(self) -> PhaseFidelity:
        perplexity = _perplexity(self._losses)
        if not self._divergences:
            return PhaseFidelity(None, None, None, None, perplexity, None)
        divergences = np.maximum(self._divergences, 0)  # rounding may make them negative
        return PhaseFidelity(
            kl_mean=float(divergences.mean()),
            kl_median=float(np.median(divergences)),
            kl_p90=float(np.quantile(divergences, 0.9)),
            top1=float(np.mean(self._agreements)),
            perplexity=perplexity,
            reference_perplexity=_perplexity(self._reference_losses),
            kl_p999=float(np.quantile(divergences, 0.999)),
            kl_max=float(divergences.max()),
            flips=len(self._agreements) - int(np.sum(self._agreements)),
        )


@dataclass(frozen=True)
class _Row:
    """A window, the reference's logits of its positions, and whether decode is measured on it."""

    window: Ids
    expected: NDArray[np.float32] | None
    decodes: bool

    def of(self, positions: slice) -> NDArray[np.float32] | None:
        """The reference's logits of these positions."""
        return None if self.expected is None else self.expected[positions]


def _compare(
    engine: Engine, windows: Sequence[_Row], skip: int, parts: int, adapter: str | None
) -> tuple[_Figures, _Figures]:
    """The figures of prefill and of decode on windows. The second half of each is decoded in so many parts, and the
    parts of all windows are the rows of one batch."""
    prefill, decode = _Figures("score and prefill graphs"), _Figures("decode graph")
    rows = [(row, part) for row in windows if row.decodes for part in _parts(len(row.window), parts)]
    rows.sort(key=lambda row: -len(row[1]))  # those that end first are last
    # One more row holds each window in turn, and a row gets what is before its part from there.
    batch = engine.new_batch(len(rows) + 1, max(len(row.window) for row in windows))
    for _ in rows:
        batch.add(adapter)
    for row in windows:
        logits = engine.score(row.window, adapter=adapter)
        state, fed = batch.add(adapter), 0
        starts = sorted((int(part[0]), place) for place, (of, part) in enumerate(rows) if of is row)
        for start, place in starts:
            engine.prefill(state, row.window[fed:start])
            batch.states[place].copy_from(state)
            fed = start
        if row.decodes:
            engine.prefill(state, row.window[fed:])
            logits[-1] = state.logits
        batch.drop(len(rows))
        prefill.add(logits[skip:], row.of(slice(skip, None)), row.window[skip + 1 :])
        del logits
    for step in range(len(rows[0][1]) if rows else 0):
        positions = [(row, int(part[step])) for row, part in rows if step < len(part)]
        batch.decode([int(row.window[position]) for row, position in positions])
        for place, (row, position) in enumerate(positions):
            if position >= skip:
                expected = row.of(slice(position, position + 1))
                decode.add(batch.logits[place : place + 1], expected, row.window[position + 1 : position + 2])
    return prefill, decode


def _parts(length: int, count: int) -> list[NDArray[np.int64]]:
    """The positions of the second half of a window, in so many parts."""
    places = np.arange(length // 2, length)
    return np.array_split(places, min(count, len(places)))


def _checked(logits: NDArray[np.float32], window: Ids, engine: Engine) -> NDArray[np.float32]:
    wanted = (len(window), engine.vocabulary)
    if logits.shape != wanted:
        raise SatchelError(
            f"the reference's logits are {list(logits.shape)} where the bundle's are {list(wanted)}: "
            "give the checkpoint that the bundle was made from, or a bundle of it"
        )
    if not all(np.isfinite(row).all() for row in logits):
        raise SatchelError("the reference's logits are not finite: give another reference, or check its weights")
    return logits


def _losses(log_probabilities: NDArray[np.float64], targets: Ids) -> NDArray[np.float64]:
    losses: NDArray[np.float64] = -log_probabilities[np.arange(len(targets)), targets]
    return losses


def _perplexity(losses: array[float]) -> float:
    return float(np.exp(min(float(np.mean(losses)), LARGEST_LOSS)))
