"""What a graph file points at outside itself: weights in files that the manifest lists, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from satchel.runtime.bundle import onnx_wire
from satchel.runtime.bundle.errors import BundleError
from satchel.runtime.bundle.limits import LIMITS

LOCATION = b"location"
"""The key without which no data is external: a message that does not hold these bytes has none."""

# Where a tensor can be, by the message's kind: its fields that hold further messages. After onnx.proto3.
NESTED: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
}

DEEPEST = 64
"""How deep graphs may lie in graphs."""


def check_external_data(model: bytes, sizes: Mapping[str, int], name: str) -> None:
    """Check a serialized graph before ONNX Runtime sees it.

    Its initializers may have their data in the files of `sizes`, by name, within their bytes; nothing else in it may
    have data outside. `name` is what messages call the graph. Raises BundleError.
    """
    if len(model) > LIMITS["graph bytes"].most:
        raise BundleError(f"{name}: larger than any graph: export the bundle again, or do not trust it")
    try:
        tensors = onnx_wire.external_tensors(model)
        places = sum(1 for _ in _places(model, "model", DEEPEST))
        if places != len(tensors):
            raise BundleError(
                f"{name}: has data outside that belongs to no initializer of its own, which is not allowed: "
                "do not trust this bundle"
            )
        for tensor in tensors.values():
            _check_place(tensor, sizes, name)
    except ValueError as error:  # no protobuf message, or no UTF-8
        raise BundleError(f"{name}: no ONNX graph ({error}): export the bundle again") from None


def _check_place(tensor: onnx_wire.Tensor, sizes: Mapping[str, int], name: str) -> None:
    location = tensor.place.get("location", "")
    if location not in sizes:
        raise BundleError(
            f"{name}: the data of {tensor.name[:60]!r} lies in {location[:60]!r}, which is no file of the bundle: "
            "do not trust this bundle"
        )
    offset, length = (_number(tensor.place.get(key, "0")) for key in ("offset", "length"))
    if offset + length > sizes[location]:
        raise BundleError(
            f"{name}: the data of {tensor.name[:60]!r} lies beyond the end of {location}: export the bundle again"
        )


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{text[:30]!r} is no place in a file")
    return int(text)


def _places(message: bytes, kind: str, room: int) -> Iterable[None]:
    """One for each tensor in a message, at any depth, that has external data."""
    if room == 0:
        raise ValueError("graphs in graphs without end")
    if kind == "tensor":
        numbers = {number for number, _, _ in onnx_wire.fields(message)}
        if onnx_wire.TENSOR_EXTERNAL_DATA in numbers:
            yield None
        return
    inner = NESTED[kind]
    for number, content, _ in onnx_wire.fields(message):
        if number in inner and LOCATION in content:
            yield from _places(content, inner[number], room - 1)
