"""How many tokens of a prompt a graph is given at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

PREFILL_CHUNK = 256  # tokens


def chunks(total: int, size: int = PREFILL_CHUNK) -> Iterator[slice]:
    """Spans of up to `size` tokens that cover `total`, none of one token alone if that can be helped.

    Some kernels take tokens in pairs, and round otherwise for one that is left over. With spans of an even size that
    can be the last token of all and no other, whatever was fed before.
    """
    start = 0
    while start < total:
        step = size - 2 if total - start == size + 1 and size > 3 else size
        yield slice(start, min(start + step, total))
        start += step


def padded_spans(total: int, size: int | None, lengths: Sequence[int]) -> Iterator[slice]:
    """Spans that cover `total` tokens for graphs of fixed `lengths`, rising: as few runs as there can be.

    The longest graph of at most `size` tokens (None: of all) takes as many as it holds, again and again; what is left
    is for the shortest that covers it, padded (`covering`). Where every graph is longer than `size`, the shortest is.
    """
    most = lengths[-1] if size is None else max((length for length in lengths if length <= size), default=size)
    for start in range(0, total, most):
        yield slice(start, min(start + most, total))


def covering(count: int, lengths: Sequence[int]) -> int:
    """The index of the shortest of `lengths`, rising, that holds `count` tokens."""
    return next(index for index, length in enumerate(lengths) if length >= count)
