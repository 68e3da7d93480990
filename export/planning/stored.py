"""Bytes of a model's weights and caches in a bundle, by its precision or recipe."""

from __future__ import annotations

import dataclasses
import functools

from satchel.export.planning.shape import FLOAT_BYTES, Cache, Matrix, Shape, share
from satchel.graphs.quant.recipe import Recipe
from satchel.runtime.bundle import shares

HALF_BYTES = 2
INT8_BYTES = 1


@dataclasses.dataclass(frozen=True)
class Precision:
    """How a bundle stores a model.

    Attributes:
        name: As `--precision` takes it.
        recipe: The rules that round weights; None for float.
        cache_bytes: Bytes of one number of the KV cache.
    """

    name: str
    recipe: Recipe | None
    cache_bytes: int

    @property
    def float_bytes(self) -> int:
        """Bytes of one weight of a matrix that no rule rounds."""
        return HALF_BYTES if self.name == "fp16" else FLOAT_BYTES

    def fitted(self, shape: Shape) -> Precision:
        """The same for a model: rules for layers with a state count only where there are such layers."""
        if self.recipe is None or any(layer.states for layer in shape.layers):
            return self
        rules = tuple(rule for rule in self.recipe.rules if not rule.states)
        return dataclasses.replace(self, recipe=dataclasses.replace(self.recipe, rules=rules))

    def nbytes(self, matrix: Matrix) -> int:
        """Bytes of a matrix with its scales and zero points. Raises RecipeError: no group size divides its inputs."""
        return _nbytes(self, matrix)

    @property
    def rotates(self) -> bool:
        """Whether norms are folded into matrices."""
        return self.recipe is not None and "rotate" in self.recipe.transforms


@functools.cache  # a plan asks for each matrix again for each number of devices
def _nbytes(precision: Precision, matrix: Matrix) -> int:
    rule = None if precision.recipe is None else precision.recipe.rule(matrix.layer, matrix.kind)
    scheme = None if rule is None else rule.scheme(matrix.inputs)
    if scheme is None:
        return matrix.size * precision.float_bytes
    return matrix.count * scheme.nbytes(matrix.outputs, matrix.inputs, matrix.kind)


def weight_bytes(shape: Shape, precision: Precision, context: int, devices: int = 1, stages: int = 1) -> int:
    """Bytes of the weights of the device that has most, with tables of rotary angles for `context` positions.

    Layers are cut over `devices`, and in groups of following layers over `stages`.
    """
    sizes, _ = _layer_bytes(shape, precision, devices, copied=stages > 1)
    if shape.head is None and precision.rotates:
        sizes[-1] += HALF_BYTES * shape.hidden**2  # the rotation before a head that is also the embedding
    rest = FLOAT_BYTES * (shape.vectors + (0 if precision.rotates else shape.norms) + shape.rotary * context)
    return round(max(sum(sizes[layer] for layer in span) for span in stage_layers(shape, precision, stages)) + rest)


def stage_layers(shape: Shape, precision: Precision, stages: int) -> list[range]:
    """The layers of each stage, as `satchel shard` divides them."""
    sizes, reads = _layer_bytes(shape, precision, 1, copied=stages > 1)
    return shares.stages(sizes, stages, reads)


def _layer_bytes(shape: Shape, precision: Precision, devices: int, *, copied: bool) -> tuple[list[float], list[float]]:
    """Bytes of each layer, with the embedding in the first and the head in the last, and those that a token reads.

    `copied` says whether a table that is both is in both.
    """
    sizes, reads = [], []
    for layer in shape.layers:
        parts = [(precision.nbytes(matrix) * share(matrix.cut, devices), matrix) for matrix in layer.matrices]
        floats = FLOAT_BYTES * (layer.vectors + (0 if precision.rotates else layer.norms))
        sizes.append(sum(size for size, _ in parts) + floats)
        reads.append(sum(size * matrix.active / matrix.count for size, matrix in parts) + floats)
    head = shape.embedding if shape.head is None else shape.head
    last = precision.nbytes(head) * share(head.cut, devices)
    sizes[0] += precision.nbytes(shape.embedding) * share(shape.embedding.cut, devices)
    sizes[-1] += last if shape.head is not None or copied else 0.0
    reads[-1] += last
    return sizes, reads


def read_bytes(shape: Shape, precision: Precision, devices: int = 1) -> int:
    """Bytes of weights that one decode step of one sequence reads on the device that has most.

    An embedding gives one row, so it counts only where it is also the head; of experts, those of one token count.
    """
    total = sum(
        precision.nbytes(matrix) * share(matrix.cut, devices) * matrix.active / matrix.count
        for layer in shape.layers
        for matrix in layer.matrices
    )
    head = shape.embedding if shape.head is None else shape.head
    return round(total + precision.nbytes(head) * share(head.cut, devices))


def cache_bytes(shape: Shape, precision: Precision, devices: int = 1) -> int:
    """Bytes of the KV cache for one token, on the device that has most."""
    return sum(_kept(layer.cache, precision, devices) for layer in shape.layers if layer.cache is not None)


def cache_read(shape: Shape, precision: Precision, length: int, devices: int = 1) -> int:
    """Bytes of the KV cache that a decode step at this length reads; layers with a window read no more than it."""
    return sum(
        _kept(layer.reads, precision, devices) * min(length, layer.reads.window or length)
        for layer in shape.layers
        if layer.reads is not None
    )


def state_bytes(shape: Shape, precision: Precision, devices: int = 1, stages: int = 1) -> int:
    """Bytes of the states of one sequence, of any length, on the device that has most."""
    sizes = [sum(state.size * share(state.cut, devices) for state in layer.states) for layer in shape.layers]
    spans = stage_layers(shape, precision, stages) if any(sizes) else []
    return FLOAT_BYTES * round(max((sum(sizes[layer] for layer in span) for span in spans), default=0))


def _kept(cache: Cache, precision: Precision, devices: int) -> int:
    number = precision.cache_bytes if cache.value_dim else FLOAT_BYTES  # a latent stays in float
    return round(cache.kv_heads * share(cache.cut, devices)) * (cache.key_dim + cache.value_dim) * number
