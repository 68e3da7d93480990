"""The number of a layer in the dotted name of a weight or a node, and names with that number left open."""

from __future__ import annotations

import re

# A number that is a whole part of the name, as in "model.layers.12.mlp"; "mul_12" is no layer.
_NUMBER = re.compile(r"(?<![^./])[0-9]{1,6}(?![^./])")


def layer_of(name: str) -> int | None:
    """The layer that a name belongs to: the first number that is a part of its own, or None."""
    found = _NUMBER.search(name)
    return int(found[0]) if found else None


def pattern_of(name: str) -> str:
    """The name with each number that is a part of its own replaced by "*": what equal layers have in common."""
    return _NUMBER.sub("*", name)
