"""Which weight is stored how, as data: ordered rules over layer names; the first match wins, none means float."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

BITS = (4, 8)
BLOCKS = (16, 32, 64, 128)
CHANNEL = "channel"
KINDS = ("linear", "embedding", "head", "experts")
ACTIVATIONS = ("float", "token", "tensor")
ROUNDINGS = ("nearest", "search", "gptq")
TRANSFORMS = ("rotate", "smooth", "hadamard")


class RecipeError(Exception):
    """A recipe says something that cannot be. The message names the place, what was found, and what is allowed."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How the numbers of one weight are stored.

    Attributes:
        bits: 4 or 8.
        block: Inputs that share a scale, 16 to 128; None for one scale per output channel.
        symmetric: Scales alone; False for a zero point beside each scale.
    """

    bits: int
    block: int | None
    symmetric: bool = True

    def bits_per_weight(self, kind: str) -> float:
        """Bits for each number, its share of a scale and a zero point included; a scale per channel counts none."""
        if self.block is None:
            return float(self.bits)
        return self.bits + (self.scale_bits(kind) + (0 if self.symmetric else self.bits)) / self.block

    def scale_bits(self, kind: str) -> int:
        """Bits of a scale in a layer of one of `KINDS`.

        Linear layers have scales of groups in float16, unless it does not hold them (`Grid.half_scales`). Embeddings
        and experts have float32: ONNX Runtime's kernels for them want constants, and a Cast is one only once it is
        folded.
        """
        return 16 if self.block is not None and kind in ("linear", "head") else 32

    def nbytes(self, outputs: int, inputs: int, kind: str) -> int:
        """Bytes of a weight of this size: values, scales and zero points."""
        groups = outputs * (1 if self.block is None else inputs // self.block)
        points = 0 if self.symmetric else self.bits
        return (outputs * inputs * self.bits + groups * (self.scale_bits(kind) + points) + 7) // 8


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule of a recipe.

    Attributes:
        layers: Patterns over the checkpoint's layer names, with * for any characters; one has to match.
        kinds: What the layer is: a linear layer, an embedding table (and a head tied to it), a head of its own,
            experts.
        bits: 4 or 8; None leaves the layer in float.
        blocks: Block sizes, the first that divides the layer's inputs is taken; "channel" for one scale per output.
        symmetric: Without zero points.
        rounding: "nearest"; "search" for the scale with the least error; "gptq", which also makes up for each
            rounding in what is not rounded yet.
        prefill: Activations of the linear layers in prefill: "float", or int8 with a scale per "token".
        decode: The same in decode; "tensor" has one scale and zero point for all tokens of a step, which is one.
        optional: True where the patterns may match no layer.
        states: True where the rule is for models with layers that keep a state (a convolution or recurrence) only.
    """

    layers: tuple[str, ...] = ("*",)
    kinds: tuple[str, ...] = KINDS
    bits: int | None = None
    blocks: tuple[int | str, ...] = (32,)
    symmetric: bool = True
    rounding: str = "search"
    prefill: str = "float"
    decode: str = "float"
    optional: bool = False
    states: bool = False

    def matches(self, layer: str, kind: str) -> bool:
        return kind in self.kinds and any(fnmatch.fnmatchcase(layer, pattern) for pattern in self.layers)

    def scheme(self, inputs: int) -> Scheme | None:
        """How a layer with so many inputs is stored; None for float.

        Raises:
            RecipeError: No block size of the rule divides the inputs.
        """
        if self.bits is None:
            return None
        for block in self.blocks:
            if isinstance(block, str):
                return Scheme(self.bits, None, self.symmetric)
            if inputs % block == 0:
                return Scheme(self.bits, block, self.symmetric)
        tried = ", ".join(map(str, self.blocks))
        raise RecipeError(f"{inputs} inputs cannot be cut into blocks of {tried}: choose a block that divides them")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a whole model is quantized.

    Attributes:
        name: What to call it.
        rules: In order; the first that matches a layer counts.
        transforms: Changes of the weights before they are rounded that leave the model's function as it is: "rotate"
            turns the residual stream and the values, "smooth" evens out the inputs of down projections, "hadamard"
            mixes them in blocks.
        hadamard_block: How many inputs of a down projection are mixed.
    """

    name: str
    rules: tuple[Rule, ...]
    transforms: tuple[str, ...] = ()
    hadamard_block: int = 16

    def rule(self, layer: str, kind: str) -> Rule | None:
        """The rule that applies to a layer, or None for float."""
        return next((rule for rule in self.rules if rule.matches(layer, kind)), None)

    def needs_calibration(self) -> bool:
        """Whether a text has to run through the model before its weights are rounded."""
        return "smooth" in self.transforms or any(rule.bits and rule.rounding == "gptq" for rule in self.rules)

    def check_layers(self, layers: Sequence[str]) -> None:
        """Check that each pattern matches a layer, unless its rule is optional.

        Raises:
            RecipeError: One does not.
        """
        for index, rule in enumerate(self.rules):
            for pattern in rule.layers:
                if not rule.optional and not fnmatch.filter(layers, pattern):
                    known = ", ".join(sorted(layers)[:4])
                    raise RecipeError(
                        f"rule {index + 1}: no layer of the model is called {pattern}: the layers are {known}, ..."
                    )


def parse_recipe(text: str, name: str) -> Recipe:
    """Read a recipe, written in TOML.

    Raises:
        RecipeError: It is not TOML, or has a key or a value that is not known.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not valid TOML ({error})") from None
    rules = document.pop("rule", [])
    if not isinstance(rules, list) or not rules:
        raise RecipeError("there is no [[rule]]: give at least one")
    top = _checked(Recipe, document, "the recipe", ("name", "rules"))
    for transform in top.get("transforms", ()):
        _one_of(transform, TRANSFORMS, "transforms")
    block = top.get("hadamard_block", 16)
    if block < 2 or block & (block - 1):
        raise RecipeError(f"hadamard_block {block} is not a power of two")
    return Recipe(name=name, rules=tuple(_rule(rule, f"rule {i + 1}") for i, rule in enumerate(rules)), **top)


def write_recipe(recipe: Recipe, comment: str) -> str:
    """A recipe as TOML, with a comment at its top; `parse_recipe` of it gives the rules again."""
    lines = [f"# {line}".rstrip() for line in comment.splitlines()]
    lines += [f"{key} = {_toml(value)}" for key, value in _changed(recipe) if key not in ("name", "rules")]
    for rule in recipe.rules:
        lines += ["", "[[rule]]", *(f"{key} = {_toml(value)}" for key, value in _changed(rule))]
    return "\n".join(lines) + "\n"


def _changed(record: Recipe | Rule) -> list[tuple[str, Any]]:
    """The fields whose values are not the defaults."""
    fields = ((field.name, getattr(record, field.name), field.default) for field in dataclasses.fields(record))
    return [(name, value) for name, value, default in fields if value != default]


def _toml(value: object) -> str:
    """Strings and whole numbers are written in TOML as in JSON, and so are lists of them."""
    if isinstance(value, tuple) and len(value) > 4:
        return "[\n" + "".join(f"  {json.dumps(item)},\n" for item in value) + "]"
    return json.dumps(value)


def _rule(document: Mapping[str, Any], place: str) -> Rule:
    if not isinstance(document, dict):
        raise RecipeError(f"{place} is not a table: write it under [[rule]]")
    rule = Rule(**_checked(Rule, document, place))
    if rule.bits is not None:
        _one_of(rule.bits, BITS, f"{place}: bits")
    for block in rule.blocks:
        _one_of(block, (*BLOCKS, CHANNEL), f"{place}: blocks")
    for field, allowed in (("rounding", ROUNDINGS), ("prefill", ACTIVATIONS[:2]), ("decode", ACTIVATIONS)):
        _one_of(getattr(rule, field), allowed, f"{place}: {field}")
    for kind in rule.kinds:
        _one_of(kind, KINDS, f"{place}: kinds")
    if rule.bits is not None and (rule.prefill, rule.decode) != ("float", "float"):
        if rule.bits != 8 or rule.blocks != (CHANNEL,) or not rule.symmetric:
            raise RecipeError(
                f'{place}: int8 activations go with bits = 8, blocks = ["channel"] and symmetric = true only: '
                "no kernel multiplies them with other weights"
            )
        if "float" in (rule.prefill, rule.decode):
            raise RecipeError(
                f"{place}: weights per channel have no kernel with float activations: quantize both phases"
            )
        if set(rule.kinds) - {"linear", "head"}:
            raise RecipeError(f'{place}: int8 activations are for linear layers: add kinds = ["linear"]')
    return rule


def _checked(
    record: type[Recipe] | type[Rule], document: Mapping[str, Any], place: str, skip: Sequence[str] = ()
) -> dict[str, Any]:
    """The document's values in the types of the record's fields.

    Raises:
        RecipeError: A key is not a field's name, or a value has another type.
    """
    fields = {field.name: field for field in dataclasses.fields(record) if field.name not in skip}
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key not in fields:
            raise RecipeError(f"{place}: {key} is not known: choose from {', '.join(fields)}")
        wanted = str(fields[key].type)
        if wanted.startswith("tuple"):
            value = tuple(value) if isinstance(value, list) else (value,)
            kinds = (int, str) if "int" in wanted else (str,)
            good = bool(value) and all(isinstance(item, kinds) for item in value)
        else:
            kind = {"bool": bool, "str": str}.get(wanted, int)
            good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not good:
            raise RecipeError(f"{place}: {key} is {value!r}: give {wanted.replace(', ...', '').replace(' | None', '')}")
        values[key] = value
    return values


def _one_of(value: object, allowed: Sequence[object], place: str) -> None:
    if value not in allowed:
        raise RecipeError(f"{place} {value}: choose {', '.join(map(str, allowed))}")
