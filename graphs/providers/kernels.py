"""The kernels of a provider that takes graphs node by node, and how nodes match them."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

NAMES = {"FLOAT": "float", "DOUBLE": "double"}


def type_name(dtype: ir.DataType) -> str:
    """Return ONNX Runtime's name for an element type: float, float16, bfloat16, double, int8, ..."""
    return NAMES.get(dtype.name, dtype.name.lower())


def operator_key(domain: str, op_type: str) -> str:
    """Return the key of an operator in the tables: its name, prefixed with its domain unless that is ai.onnx."""
    return op_type if domain in ("", "ai.onnx") else f"{domain}::{op_type}"


@dataclass(frozen=True)
class Formal:
    """A formal parameter of an operator: its name, and a type variable or fixed type."""

    name: str
    type: str


@dataclass(frozen=True)
class Signature:
    """The formal parameters of an operator. The last input and the last output may be variadic."""

    inputs: tuple[Formal, ...]
    outputs: tuple[Formal, ...]


@dataclass(frozen=True)
class Kernel:
    """A registered kernel.

    Attributes:
        since, until: The range of operator versions that it supports. Without `until` it supports only `since`: in ONNX
            Runtime an open range does not cover later versions of the operator (VerifyVersion in kernel_registry.cc).
        types: The element types allowed for each type variable or parameter name.
        signatures: How the variables bind to inputs and outputs; at least one must match.
    """

    since: int
    until: int | None
    types: Mapping[str, frozenset[str]]
    signatures: tuple[Signature, ...]

    def is_for(self, version: int) -> bool:
        return version == self.since or (self.until is not None and self.since <= version <= self.until)


class Match(enum.Enum):
    """The result of matching a node to a kernel table."""

    FITS = enum.auto()
    NO_KERNEL = enum.auto()
    NO_VERSION = enum.auto()
    NO_TYPE = enum.auto()
    UNVERIFIED = enum.auto()
    OF_LIBRARY = enum.auto()


@dataclass(frozen=True)
class Fit:
    """How a node matches, and the reason if it does not."""

    match: Match
    detail: str = ""


@dataclass(frozen=True)
class KernelTable:
    """The kernels of a provider in one version of ONNX Runtime.

    Attributes:
        name: For messages, such as "ONNX Runtime 1.24.4".
        since: The versions of each operator's definition, ascending.
        kernels: The kernels of each operator.
    """

    name: str
    since: Mapping[str, Sequence[int]]
    kernels: Mapping[str, Sequence[Kernel]]

    def version(self, key: str, opset: int) -> int | None:
        """Return the version of an operator's definition at this opset, or None if there is none."""
        known = self.since.get(key) or sorted({kernel.since for kernel in self.kernels.get(key, ())})
        return max((version for version in known if version <= opset), default=None)

    def fit(self, node: ir.Node, opset: int, standing_in: Mapping[str, str] | None = None) -> Fit:
        """Match a node to a kernel: by domain, operator, version and types, in this order.

        Args:
            node: The node, with the types of its values as far as they are known.
            opset: The opset of the node's domain that the graph imports.
            standing_in: Element types to replace with others before matching, as casts would.
        """
        key = operator_key(node.domain, node.op_type)
        version = self.version(key, opset)
        kernels = self.kernels.get(key, ())
        if not kernels:
            return Fit(Match.NO_KERNEL, "no kernel for any version")
        if version is None:
            return Fit(Match.NO_VERSION, f"opset {opset} has no {node.op_type}")
        there = [kernel for kernel in kernels if kernel.is_for(version)]
        if not there:
            spans = ", ".join(_span(kernel) for kernel in sorted(kernels, key=lambda kernel: kernel.since))
            return Fit(Match.NO_VERSION, f"its definition has version {version}, but the kernels are for {spans}")
        failures = [_misfit(node, kernel, standing_in or {}) for kernel in there]
        return min(failures, key=lambda fit: (Match.FITS, Match.UNVERIFIED, Match.NO_TYPE).index(fit.match))


def _span(kernel: Kernel) -> str:
    return str(kernel.since) if kernel.until in (None, kernel.since) else f"{kernel.since}-{kernel.until}"


def _misfit(node: ir.Node, kernel: Kernel, standing_in: Mapping[str, str]) -> Fit:
    """Match a node's types to a kernel of its version, by the kernel's best signature."""
    wrong: list[Fit] = []
    for signature in kernel.signatures:
        fits = [_fit_value(value, allowed, standing_in) for value, allowed in _constrained(node, kernel, signature)]
        bad = [fit for fit in fits if fit.match is Match.NO_TYPE] or [f for f in fits if f.match is Match.UNVERIFIED]
        if not bad:
            return Fit(Match.FITS)
        wrong.append(bad[0])
    return min(wrong, key=lambda fit: fit.match is Match.NO_TYPE, default=Fit(Match.FITS))


def _constrained(node: ir.Node, kernel: Kernel, signature: Signature) -> Iterator[tuple[ir.Value, frozenset[str]]]:
    """Yield each value of a node that a kernel's types constrain, with the allowed types."""
    for values, formals in ((node.inputs, signature.inputs), (node.outputs, signature.outputs)):
        for index, value in enumerate(values):
            if value is None or not formals or (not value.name and not value.uses()):
                continue
            formal = formals[min(index, len(formals) - 1)]
            allowed = kernel.types.get(formal.type) or kernel.types.get(formal.name)
            if allowed is not None:
                yield value, allowed


def _fit_value(value: ir.Value, allowed: frozenset[str], standing_in: Mapping[str, str]) -> Fit:
    if value.dtype is None:
        return Fit(Match.UNVERIFIED, f"the type of {value.name} is unknown")
    found = type_name(value.dtype)
    if standing_in.get(found, found) in allowed:
        return Fit(Match.FITS)
    return Fit(Match.NO_TYPE, f"{value.name} is {found}, but the kernel supports {', '.join(sorted(allowed))}")
