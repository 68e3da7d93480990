"""Splits a prompt into spans, each for one run of a prefill graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

PREFILL_CHUNK = 256  # tokens
OWN_CHUNK = 512  # the same with satchel's kernels, which read the weights once for all of them


def chunks(total: int, size: int = PREFILL_CHUNK) -> Iterator[slice]:
    """Spans of up to `size` tokens that cover `total`, none with a single token if that can be avoided.

    Some kernels take tokens in pairs and round a leftover one differently. With spans of an even size only the very
    last token can be left over, whatever was fed before.
    """
    start = 0
    while start < total:
        step = size - 2 if total - start == size + 1 and size > 3 else size
        yield slice(start, min(start + step, total))
        start += step


def padded_spans(total: int, size: int | None, lengths: Sequence[int]) -> Iterator[slice]:
    """Spans that cover `total` tokens in as few runs as possible of graphs with fixed `lengths`, in ascending order.

    The longest graph of at most `size` tokens (None: of any length) is run while it is full; the shortest that holds
    the rest runs padded (`covering`). If every graph is longer than `size`, spans have `size` tokens.
    """
    longest = lengths[-1] if size is None else max((length for length in lengths if length <= size), default=size)
    for start in range(0, total, longest):
        yield slice(start, min(start + longest, total))


def covering(count: int, lengths: Sequence[int]) -> int:
    """The index of the shortest of `lengths`, in ascending order, that holds `count` tokens."""
    return next(index for index, length in enumerate(lengths) if length >= count)
