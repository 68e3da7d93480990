"""Dividing a model among ranks: counts, heads and layers."""

import itertools

import pytest

from satchel.runtime.bundle.shares import ShareError, counts, heads, spans, stages


def test_counts_follow_shares_and_add_up() -> None:
    assert counts(9, [1, 1]) == [5, 4]
    assert counts(8, [2, 1, 1]) == [4, 2, 2]
    assert counts(7, [100, 1, 1]) == [5, 1, 1], "every rank gets something where there is enough"
    assert counts(2, [1, 1, 1]) == [1, 1, 0]
    for total, ranks in itertools.product(range(1, 20), range(1, 8)):
        assert sum(counts(total, [1.0] * ranks)) == total


@pytest.mark.parametrize("shares", [[], [1, 0], [1, -1]])
def test_shares_must_be_above_zero(shares: list[float]) -> None:
    with pytest.raises(ShareError):
        counts(4, shares)


def test_spans_keep_units_together() -> None:
    assert spans(1536, [1, 1, 1, 1], 512) == [range(512), range(512, 1024), range(1024, 1536), range(1536, 1536)]
    assert spans(1536, [1, 1], 64) == [range(768), range(768, 1536)]
    with pytest.raises(ShareError):
        spans(100, [1, 1], 64)


@pytest.mark.parametrize("ranks", range(1, 10))
def test_all_heads_are_there_once_and_beside_their_keys(ranks: int) -> None:
    found = heads(9, 3, [1.0] * ranks)
    assert [head for each in found for head in each.queries] == list(range(9))
    for each in found:
        assert each.queries
        assert {head // 3 for head in each.queries} == set(each.keys)
        assert set(each.queries) <= set(each.projected)
        assert not len(each.projected) % len(each.keys)


def test_key_heads_are_divided_unevenly_or_replicated() -> None:
    assert [(len(each.queries), each.keys) for each in heads(9, 3, [1, 1])] == [(5, range(2)), (4, range(1, 3))]
    assert [each.projected for each in heads(9, 3, [1, 1])] == [range(6), range(3, 9)]
    assert [len(each.queries) for each in heads(9, 3, [1, 1], whole_groups=True)] == [6, 3]
    assert [len(each.keys) for each in heads(32, 8, [1] * 3)] == [3, 3, 2], "a rank would need a fourth key head"
    assert [each.keys for each in heads(9, 3, [1] * 4)] == [range(1), range(1), range(1, 2), range(2, 3)]
    assert [len(each.queries) for each in heads(8, 8, [2, 1, 1])] == [4, 2, 2]


def test_heads_of_a_block_stay_together() -> None:
    assert [each.queries for each in heads(4, 4, [1, 1], unit=2)] == [range(2), range(2, 4)]
    for ranks in (3, 4):
        with pytest.raises(ShareError):
            heads(4, 4, [1] * ranks, unit=2)
    with pytest.raises(ShareError):
        heads(9, 3, [1] * 10)


def test_the_largest_stage_is_as_small_as_possible() -> None:
    assert stages([1, 1, 1, 1], 2) == [range(2), range(2, 4)]
    assert stages([5, 1, 1, 1, 1], 2) == [range(1), range(1, 5)]
    for sizes in ([3, 1, 4, 1, 5, 9, 2, 6], [1, 1, 10, 1, 1], [7]):
        for count in range(1, len(sizes) + 1):
            found = stages(sizes, count)
            assert [layer for part in found for layer in part] == list(range(len(sizes)))
            largest = max(sum(sizes[layer] for layer in part) for part in found)
            places = itertools.combinations(range(1, len(sizes)), count - 1)
            cuts = ([0, *ends, len(sizes)] for ends in places)
            assert largest == min(max(sum(sizes[a:b]) for a, b in itertools.pairwise(cut)) for cut in cuts)
    for count in (0, 3):
        with pytest.raises(ShareError):
            stages([1, 1], count)
