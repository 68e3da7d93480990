"""Lists the CPU kernels of the installed ONNX Runtime, from its own tables."""

from __future__ import annotations

from collections import defaultdict
from functools import cache
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from satchel.graphs.providers.kernels import Formal, Kernel, KernelTable, Signature, operator_key

CPU = "CPUExecutionProvider"
OPEN = (1 << 31) - 1
"""The end of an open version range."""


@cache
def schemas() -> dict[str, dict[int, Signature]]:
    """The signature of every operator known to ONNX Runtime, by operator key and version of the definition."""
    found: dict[str, dict[int, Signature]] = defaultdict(dict)
    for schema in ort.get_all_operator_schema():
        signature = Signature(_formals(schema.inputs), _formals(schema.outputs))
        found[operator_key(schema.domain, schema.name)][schema.since_version] = signature
    return found


@cache
def known_domains() -> frozenset[str]:
    """The operator domains that ONNX Runtime knows without a custom library."""
    return frozenset({"", *(schema.domain for schema in ort.get_all_operator_schema())})


@cache
def cpu_kernels() -> KernelTable:
    """The table of CPU kernels of the installed ONNX Runtime."""
    known, kernels = schemas(), defaultdict(list)
    for row in ort.get_all_opkernel_def():
        if row.provider != CPU:
            continue
        key = operator_key(row.domain, row.op_name)
        since, until = row.version_range
        last = since if until == OPEN else until
        signatures = tuple(s for version, s in known.get(key, {}).items() if since <= version <= last)
        types = {name: frozenset(map(_plain, allowed)) for name, allowed in row.type_constraints.items()}
        kernels[key].append(Kernel(since, None if until == OPEN else until, types, signatures))
    since_versions = {key: sorted(versions) for key, versions in known.items()}
    return KernelTable(f"ONNX Runtime {onnxruntime.__version__}", since_versions, dict(kernels))


def _formals(parameters: Any) -> tuple[Formal, ...]:
    return tuple(Formal(parameter.name, _plain(parameter.typeStr)) for parameter in parameters)


def _plain(text: str) -> str:
    """The element type of a tensor type such as "tensor(float)"; other types and type variables unchanged."""
    return text[len("tensor(") : -1] if text.startswith("tensor(") else text
