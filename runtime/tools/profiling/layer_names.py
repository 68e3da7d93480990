"""Finds the layer number in the dotted name of a weight or node, and the pattern of a name without it."""

from __future__ import annotations

import re

from satchel.runtime.bundle.manifest import Manifest

# A number that is a whole part of the name, as in "model.layers.12.mlp"; "mul_12" is not a layer.
_NUMBER = re.compile(r"(?<![^./])[0-9]{1,6}(?![^./])")


def layer_of(name: str) -> int | None:
    """The layer of a name: its first number that is a whole part, or None."""
    found = _NUMBER.search(name)
    return int(found[0]) if found else None


def pattern_of(name: str) -> str:
    """The name with each number that is a whole part replaced by "*", so that equal layers have equal patterns."""
    return _NUMBER.sub("*", name)


def layer_count(manifest: Manifest) -> int:
    """One more than the highest number of a layer that keeps something from token to token, as far as names tell."""
    layers = manifest.kv_cache.layers
    numbers = [layer_of(layer.past_key) for layer in layers] + [state.layer for state in manifest.states]
    return max([len(layers), *(number + 1 for number in numbers if number is not None)])
