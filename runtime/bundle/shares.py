"""How a model is divided among ranks: counts in proportion to shares, heads of attention, and layers of stages.

`satchel shard` cuts bundles by these functions. They know numbers only, neither graphs nor weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


class ShareError(ValueError):
    """A model cannot be divided as asked. The message says what was found and what to do."""


@dataclass(frozen=True)
class Heads:
    """The heads of an attention layer that one rank has: those of queries, and those of keys and values. In the whole
    layer, `group` query heads share a key head."""

    queries: range
    keys: range
    group: int

    @property
    def projected(self) -> range:
        """The query heads that the rank projects: as many for each key head, as operators of attention need them.
        Where those of a key head are divided, it attends with `queries` only."""
        if len(self.keys) == 1:
            return self.queries
        return range(self.keys.start * self.group, self.keys.stop * self.group)


def counts(total: int, shares: Sequence[float]) -> list[int]:
    """Divide `total` things in proportion to `shares` by largest remainders; earlier ranks get what is left over.

    Where there are enough of them, every rank gets at least one.

    Raises:
        ShareError: There are no shares, or one is not above 0.
    """
    if not shares or min(shares) <= 0:
        raise ShareError(f"shares {list(shares)}: give a number above 0 for each rank")
    exact = [total * share / sum(shares) for share in shares]
    found = [int(part + 1e-9) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda rank: (found[rank] - exact[rank], rank))
    for rank in by_remainder[: total - sum(found)]:
        found[rank] += 1
    while total >= len(found) and min(found) == 0:
        found[found.index(max(found))] -= 1
        found[found.index(0)] += 1
    return found


def spans(total: int, shares: Sequence[float], unit: int = 1) -> list[range]:
    """Neighboring ranges that cover `total`, one for each rank in proportion to its share.

    All begin at multiples of `unit`, so that a block of so many is never split. A rank may get none.

    Raises:
        ShareError: As `counts`; or `total` is not a multiple of `unit`.
    """
    if total % unit:
        raise ShareError(f"{total} is not a multiple of {unit}, which must stay together")
    ends = list(itertools.accumulate(counts(total // unit, shares), initial=0))
    return [range(start * unit, end * unit) for start, end in itertools.pairwise(ends)]


def heads(queries: int, keys: int, shares: Sequence[float], unit: int = 1, whole_groups: bool = False) -> list[Heads]:
    """The heads of each rank. `queries` is a multiple of `keys`: so many query heads share a key head.

    Where there are at least as many key heads as ranks, they are divided, each with its query heads. Where that is
    uneven, two ranks may have a key head and each some of its query heads, if no rank gets more key heads so. With
    fewer key heads than ranks, the query heads of each are divided among several ranks, which all have that key head.

    Args:
        queries: Query heads.
        keys: Heads of keys and values.
        shares: Of each rank.
        unit: How many neighboring query heads must stay together, because a block of quantized weights covers them.
        whole_groups: Whether the query heads of a key head stay together where there are enough key heads.

    Raises:
        ShareError: There are fewer query heads, in such units, than ranks; or `counts` raises it.
    """
    ranks, group = len(shares), queries // keys
    if ranks > keys:
        owners = spans(ranks, [1.0] * keys)
        if group // unit < max(map(len, owners)):
            found = f"{queries} heads with {keys} of keys" + (f", in units of {unit}" if unit > 1 else "")
            raise ShareError(f"{found} cannot be divided among {ranks} ranks: choose {keys * (group // unit) or keys}")
        found_heads = []
        for key, members in enumerate(owners):
            for part in spans(group, [shares[rank] for rank in members], unit):
                own = range(key * group + part.start, key * group + part.stop)
                found_heads.append(Heads(own, range(key, key + 1), group))
        return found_heads
    together = next(count for count in range(1, unit + 1) if count * group % unit == 0)
    if keys % together or keys // together < ranks:
        raise ShareError(
            f"{keys} heads of keys, of which {together} must stay together, cannot be divided among {ranks} ranks: "
            f"choose {keys // together or 1}"
        )
    whole = [Heads(range(p.start * group, p.stop * group), p, group) for p in spans(keys, shares, together)]
    if whole_groups or queries % unit:
        return whole
    parts = spans(queries, shares, unit)
    split = [Heads(p, range(p.start // group, -(-p.stop // group)), group) for p in parts]

    def largest(division: Sequence[Heads]) -> float:
        return max(len(each.queries) / share for each, share in zip(division, shares, strict=True))

    fewer = all(len(a.keys) <= max(len(b.keys) for b in whole) for a in split)
    return split if all(parts) and fewer and largest(split) < largest(whole) else whole


def stages(
    sizes: Sequence[float], count: int, reads: Sequence[float] = (), shares: Sequence[float] | None = None
) -> list[range]:
    """Neighboring layers for each of `count` stages, so that the largest part that a stage has is as small as possible.

    Args:
        sizes: The bytes of each layer.
        count: How many stages.
        reads: The bytes that a token reads of each layer, which say what time it takes. If given, a stage's part is
            the larger one of its parts of both sums.
        shares: The parts that stages should have, in proportion; None for equal ones.

    Raises:
        ShareError: There are fewer layers than stages, no stage, or other shares than stages.
    """
    if not 1 <= count <= len(sizes):
        raise ShareError(f"{len(sizes)} layers cannot be divided into {count} stages: choose 1 to {len(sizes)}")
    shares = [1.0] * count if shares is None else shares
    if len(shares) != count or min(shares) <= 0:
        raise ShareError(f"shares {list(shares)}: give a number above 0 for each of {count} stages")
    sums = [[0.0, *itertools.accumulate(each)] for each in (sizes, reads) if each]

    def part(first: int, last: int, stage: int) -> float:
        return max((starts[last] - starts[first]) / (starts[-1] or 1) for starts in sums) / shares[stage]

    # best[k][n]: the smallest largest stage of the first n layers in k + 1 stages
    best = [[part(0, last, 0) for last in range(len(sizes) + 1)]]
    cuts: list[list[int]] = []
    for stage in range(1, count):
        row, cut = [float("inf")] * (len(sizes) + 1), [0] * (len(sizes) + 1)
        for last in range(stage + 1, len(sizes) + 1):
            for first in range(last - 1, stage - 1, -1):
                own = part(first, last, stage)
                if own > row[last]:
                    break  # it only grows with more layers
                if (largest := max(best[-1][first], own)) <= row[last]:
                    row[last], cut[last] = largest, first
        best.append(row)
        cuts.append(cut)
    ends = [len(sizes)]
    for cut in reversed(cuts):
        ends.append(cut[ends[-1]])
    return [range(start, end) for start, end in itertools.pairwise([0, *ends[::-1]])]
