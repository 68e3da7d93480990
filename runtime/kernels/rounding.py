"""Rounds weights by compiled loops, for the exporter: the bits are those of numpy and torch, and the time a tenth."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import SatchelError
from satchel.runtime.kernels import library

_FLOATS, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _ScalesCall(ctypes.Structure):
    _fields_ = [
        ("groups", _LONG), ("width", _LONG), ("candidates", _LONG), ("kinds", _LONG), ("weights", _FLOATS),
        ("scales", _FLOATS), ("zeros", _FLOATS), ("counts", _FLOATS), ("low", _FLOAT), ("high", _FLOAT),
        ("scratch", _FLOATS), ("best", _FLOATS),
    ]  # fmt: skip


class _InputsCall(ctypes.Structure):
    _fields_ = [
        ("inputs", _LONG), ("outputs", _LONG), ("square", _FLOATS), ("stride", _LONG), ("group_of", _FLOATS),
        ("scales", _FLOATS), ("zeros", _FLOATS), ("low", _FLOAT), ("high", _FLOAT), ("values", _FLOATS),
        ("codes", _FLOATS), ("moved", _FLOATS),
    ]  # fmt: skip


LANES = 8
"""`choose_scales` takes groups of a multiple of so many weights."""

INPUTS = 128
"""The most inputs of one call of `round_inputs` and `descend_inputs`."""


def compiled() -> ctypes.CDLL | None:
    """The library with these loops; None if it cannot be used on this machine, or was built before it had them.

    Raises:
        SatchelError: `SATCHEL_KERNELS` names an instruction set that is unknown or not possible here.
    """
    path = library.library()
    loops = None if path is None else ctypes.CDLL(str(path))
    return loops if hasattr(loops, "satchel_choose_scales") else None


def choose_scales(
    loops: ctypes.CDLL,
    weights: NDArray[np.float32],
    scales: NDArray[np.float32],
    zeros: NDArray[np.float32] | None,
    counts: NDArray[np.float32] | None,
    bounds: tuple[int, int],
) -> NDArray[np.int32]:
    """Find for each group of weights the scale with the least sum of squared errors.

    Args:
        loops: What `compiled` returned.
        weights: [groups, width].
        scales: [candidates, groups].
        zeros: Zero points, shaped as `scales`; None if all are 0.
        counts: How much the squared error of each weight counts, [kinds, width], by turns for the groups; None if all
            are the same.
        bounds: The least and the largest quantized value.

    Returns:
        [groups], the first candidate that no other is better than.
    """
    groups, width = weights.shape
    best = np.empty(groups, np.int32)
    scratch = np.empty(4 * width + 32 * len(scales), np.float32)
    call = _ScalesCall(
        groups, width, len(scales), 1 if counts is None else len(counts), _at(weights), _at(scales), _at(zeros),
        _at(counts), *bounds, _at(scratch), _at(best),
    )  # fmt: skip
    loops.satchel_choose_scales(ctypes.byref(call))
    return best


def round_inputs(
    loops: ctypes.CDLL,
    square: NDArray[np.float32],
    group_of: NDArray[np.int64],
    scales: NDArray[np.float32],
    zeros: NDArray[np.float32] | None,
    bounds: tuple[int, int],
    values: NDArray[np.float32],
    codes: NDArray[np.float32],
    *,
    descend: bool = False,
) -> NDArray[np.float32]:
    """Round inputs of a layer one after the other, each making up for those before.

    Args:
        loops: What `compiled` returned.
        square: [inputs, inputs], of the upper factor of the inverse moments, or of the moments.
        group_of: The group of each input, [inputs].
        scales: [groups, outputs].
        zeros: Zero points, shaped as `scales`; None if all are 0.
        bounds: The least and the largest quantized value.
        values: [inputs, outputs]: weights, or half of the slope of the error.
        codes: [inputs, outputs], receives the quantized values.
        descend: Set each of the `codes` to the best with all others fixed, in place of rounding weights as GPTQ.

    Returns:
        [inputs, outputs]: the errors that later inputs make up for, or how far values have moved.
    """
    if len(values) > INPUTS:
        raise SatchelError(f"{len(values)} inputs cannot be rounded at once: give at most {INPUTS}")
    moved = np.empty_like(values)
    call = _InputsCall(
        *values.shape, _at(square), len(square), _at(group_of), _at(scales), _at(zeros), *bounds,
        _at(values), _at(codes), _at(moved),
    )  # fmt: skip
    (loops.satchel_descend_inputs if descend else loops.satchel_round_inputs)(ctypes.byref(call))
    return moved


def _at(array: NDArray[Any] | None) -> int | None:
    """The address of an array, whose rows lie one after the other."""
    if array is None:
        return None
    if not array.flags.c_contiguous:
        raise ValueError("an array is not contiguous")
    return array.ctypes.data
