"""Checks that the nodes of a graph run on the requested provider."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnxruntime as ort

from satchel.runtime.errors import ProviderError, SatchelWarning
from satchel.runtime.ort.providers import PROVIDERS, ProviderChoice

RECORD = "session.record_ep_graph_assignment_info"
"""The session entry that makes ONNX Runtime record the provider of each node; "1" to enable."""

SHOWN = 3


def check_placement(session: ort.InferenceSession, choice: ProviderChoice, graph: Path) -> None:
    """Warn with SatchelWarning about nodes that run on another provider than the requested one.

    Nodes that are expected on the CPU (`Provider.on_cpu`) are left out; they are recognized by operator type, the only
    fact that ONNX Runtime reports. Raises ProviderError instead if the choice is strict, and in any case if the
    provider is not in the session at all, which ONNX Runtime only logs.
    """
    wanted = PROVIDERS[choice.name]
    there = session.get_providers()
    if wanted.ort_name not in there:
        raise ProviderError(
            f"--provider {choice.name}: ONNX Runtime could not start {wanted.ort_name} and went on with "
            f"{', '.join(there)}: run with --verbose to see why (a driver or a library of the device may be missing)"
        )
    if (strayed := strayed_nodes(session, choice)) is None:
        _complain(
            choice, f"{graph.name}: ONNX Runtime {ort.__version__} does not report which nodes run on {wanted.ort_name}"
        )
    elif strayed:
        more = f" and {len(strayed) - SHOWN} more" if len(strayed) > SHOWN else ""
        nodes = "node runs" if len(strayed) == 1 else "nodes run"
        _complain(
            choice,
            f"{graph.name}: {len(strayed)} {nodes} on another provider than {wanted.ort_name}: "
            f"{', '.join(strayed[:SHOWN])}{more}",
        )


def strayed_nodes(session: ort.InferenceSession, choice: ProviderChoice) -> list[str] | None:
    """The nodes on other providers, each as "type name (provider)"; None if ONNX Runtime does not report them.

    The session must have been opened with `RECORD`.
    """
    wanted = PROVIDERS[choice.name]
    assigned = getattr(session, "get_provider_graph_assignment_info", None)
    if assigned is None:
        return None
    return [
        f"{node.op_type} {node.name} ({subgraph.ep_name})"
        for subgraph in assigned()
        if subgraph.ep_name != wanted.ort_name
        for node in subgraph.get_nodes()
        if subgraph.ep_name != PROVIDERS["cpu"].ort_name or node.domain or node.op_type not in wanted.on_cpu
    ]


def _complain(choice: ProviderChoice, what: str) -> None:
    if choice.strict:
        raise ProviderError(f"{what}: leave --strict out to run anyway, or export for this provider again")
    warnings.warn(what, SatchelWarning, stacklevel=2)
