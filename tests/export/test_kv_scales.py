"""kv_scales: a scale per head and channel, one for both channels of a rotary pair, and none that is zero."""

from __future__ import annotations

import numpy as np
import pytest

from satchel.export.errors import ExportError
from satchel.export.quantize.kv_scales import kv_scales

STEP = np.float32(1 / 127)
KEYS = np.asarray([[1, 2, 3, 4, 5, 6], [60, 50, 40, 30, 20, 10]], np.float32)
PAIRED = {
    "no rotation": (0, False, KEYS),
    "halves": (6, False, [[4, 5, 6, 4, 5, 6], [60, 50, 40, 60, 50, 40]]),
    "neighbors": (6, True, [[2, 2, 4, 4, 6, 6], [60, 60, 40, 40, 20, 20]]),
    "halves of the first channels": (4, False, [[3, 4, 3, 4, 5, 6], [60, 50, 60, 50, 20, 10]]),
    "neighbors in the first channels": (2, True, [[2, 2, 3, 4, 5, 6], [60, 60, 40, 30, 20, 10]]),
}


@pytest.mark.parametrize("name", PAIRED)
def test_channels_that_turn_into_each_other_share_the_larger_scale(name: str) -> None:
    rotary, interleaved, wanted = PAIRED[name]
    scales = kv_scales(KEYS, KEYS, rotary, interleaved)
    np.testing.assert_allclose(scales.key, STEP * np.asarray(wanted, np.float32), rtol=1e-6)
    np.testing.assert_allclose(scales.value, STEP * KEYS, rtol=1e-6)
    assert (scales.key.dtype, scales.value.dtype) == (np.float32, np.float32)


def test_a_rotated_key_stays_within_the_codes_at_every_angle() -> None:
    rng = np.random.default_rng(1)
    keys = rng.standard_normal((1, 2, 8)).astype(np.float32)
    scales = kv_scales(np.abs(keys[0]), np.abs(keys[0]), 8, False)
    angle = np.linspace(0, 6, 50)[:, None, None]
    first, second = keys[..., :4], keys[..., 4:]
    turned = np.concatenate([first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle)], -1)
    assert np.abs(turned / scales.key).max() < 127 * 2**0.5  # a pair of equals meets in one channel


def test_a_channel_at_rest_gets_a_scale_all_the_same() -> None:
    maxima = np.asarray([[0, 8], [0, 0]], np.float32)
    scales = kv_scales(maxima, maxima, 0, False)
    np.testing.assert_allclose(scales.value, STEP * np.asarray([[0.008, 8], [1, 1]], np.float32), rtol=1e-6)


@pytest.mark.parametrize("part", ["keys", "values"])
def test_numbers_that_are_not_finite_are_an_error(part: str) -> None:
    bad = np.full((1, 4), np.nan, np.float32)
    good = np.ones((1, 4), np.float32)
    with pytest.raises(ExportError, match=f"the {part} .* not all finite"):
        kv_scales(bad if part == "keys" else good, bad if part == "values" else good, 4, False)
