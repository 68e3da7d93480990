"""Tables of the operators, versions and types that each provider supports, read from cann.json and cuda.json.

Both files name their sources and commits. In cuda.json a kernel is [since, until, types by variable,
index of its signature, versions of ONNX Runtime that have it].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from satchel.graphs.providers.kernels import Formal, Kernel, KernelTable, Signature

VERSIONS = ("1.24.4", "1.30")
"""Versions of ONNX Runtime with tables, oldest first."""

OR = ";;or;;"


@dataclass(frozen=True)
class CannFacts:
    """What ONNX Runtime's CANN provider and the toolkit's parser support.

    Attributes:
        opsets: The lowest and highest opsets of the parser's entries.
        recommended_opset: The opset to export with.
        ir_version: The highest IR version that the released wheel supports.
        whitelist: Operators that the provider runs with enable_cann_subgraph.
        no_int64: Operators whose kernels do not support int64 data.
        parser: The opsets of each operator's entries, on the parser's development branch and on its released branches;
            "" for none.
    """

    opsets: tuple[int, int]
    recommended_opset: int
    ir_version: int
    whitelist: frozenset[str]
    no_int64: frozenset[str]
    parser: Mapping[str, tuple[str, str]]


@cache
def cann_facts() -> CannFacts:
    """Return the contents of cann.json."""
    document = _read("cann.json")
    low, high = document["opsets"]
    parser = {}
    for name, entry in document["parser"].items():
        on = entry if isinstance(entry, dict) else {"master": entry, "releases": entry}
        parser[name] = (on["master"] or "", on["releases"] or "")
    return CannFacts(
        opsets=(low, high),
        recommended_opset=document["recommended_opset"],
        ir_version=document["ir_version"],
        whitelist=frozenset(document["whitelist"].split()),
        no_int64=frozenset(document["no_int64"]),
        parser=parser,
    )


@cache
def cuda_kernels(version: str) -> KernelTable:
    """Return the CUDA kernels of one of the `VERSIONS` of ONNX Runtime."""
    document = _read("cuda.json")
    types = {name: frozenset(listed.split()) for name, listed in document["types"].items()}
    kernels = {}
    for key, entry in document["operators"].items():
        parsed = [[_signature(text) for text in texts.split(OR)] for texts in entry["signatures"]]
        kernels[key] = tuple(
            Kernel(
                since, until, {name: types[held] for name, held in variables.items()}, _usable(parsed[of], variables)
            )
            for since, until, variables, of, there in entry["kernels"]
            if there in ("both", version)
        )
    return KernelTable(f"ONNX Runtime {version}", document["since"], kernels)


@cache
def cuda_ir_version(version: str) -> int | None:
    """Return the highest IR version that a version of ONNX Runtime supports, or None if unknown."""
    highest: int | None = _read("cuda.json")["ir_version"].get(version)
    return highest


def covers(ranges: str, opset: int) -> bool:
    """Whether a list of ranges such as "8,12-18" contains an opset."""
    for part in filter(None, ranges.split(",")):
        first, _, last = part.partition("-")
        if int(first) <= opset <= int(last or first):
            return True
    return False


def _usable(signatures: list[Signature], variables: Mapping[str, str]) -> tuple[Signature, ...]:
    """Return the signatures that bind all of a kernel's type variables, or all signatures if none does.

    Versions of an operator differ in their signatures, and a kernel's variables tell which version it is for.
    """
    return tuple(s for s in signatures if set(variables) <= _types(s)) or tuple(signatures)


def _types(signature: Signature) -> set[str]:
    return {formal.type for formal in (*signature.inputs, *signature.outputs)}


def _signature(text: str) -> Signature:
    """Parse a signature such as "in X:T; in Y:T; out Z:T1"."""
    sides: dict[str, list[Formal]] = {"in": [], "out": []}
    for part in text.split(";"):
        side, _, rest = part.strip().partition(" ")
        if side in sides:
            name, _, kind = rest.partition(":")
            sides[side].append(Formal(name, kind))
    return Signature(tuple(sides["in"]), tuple(sides["out"]))


@cache
def _read(name: str) -> Any:
    return json.loads(resources.files("satchel.graphs.providers").joinpath(name).read_text(encoding="utf-8"))
