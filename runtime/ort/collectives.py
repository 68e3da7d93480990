"""Whether this ONNX Runtime has the operators by which the parts of a model exchange numbers over NCCL."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from satchel.runtime.errors import ProviderError

OPERATOR, DOMAIN = "AllReduce", "com.microsoft"


def lacking(path: str | Path) -> str | None:
    """Why this ONNX Runtime runs no graph that exchanges numbers over NCCL, as a message; None where it does.

    Builds that do not list their operators are taken to have it: a session says so where it cannot load the graph.
    """
    listed = getattr(state, "get_all_operator_schema", None)
    if listed is None or any((each.domain, each.name) == (DOMAIN, OPERATOR) for each in listed()):
        return None
    return (
        f"{path}: its ranks exchange numbers by {DOMAIN}.{OPERATOR}, which this onnxruntime ({ort.__version__}) does "
        "not have: build ONNX Runtime with CUDA, NCCL and MPI, or export for --target cpu and cut that"
    )


def check_collectives(path: str | Path, provider: str) -> None:
    """Raise ProviderError unless a provider of this ONNX Runtime runs graphs that exchange numbers over NCCL."""
    reason = lacking(path)
    if reason is not None:
        raise ProviderError(reason)
    if provider != "cuda":
        raise ProviderError(f"{path}: its ranks exchange numbers over NCCL, between CUDA devices: use --provider cuda")
