"""How the runner opens the graphs of each target."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from satchel.graphs.quant.quantized import Quantized, quantized_products
from satchel.graphs.targets.steps import ACTIVATIONS, only_kept_fours
from satchel.runtime.bundle.contract import DECODE_BLOCKS, EMBED, NATIVE, PHASES, PREFILL_INT8

EXACT_PRODUCTS = {"session.x64quantprecision": "1"}
"""Weights become unsigned on x86-64 without VNNI, where sums of unsigned times signed bytes overflow 16 bits."""


@dataclasses.dataclass(frozen=True)
class Session:
    """How the runner opens a graph.

    Attributes:
        config: Session configuration entries.
        of: The phase whose session runs this phase too, where their kernels and weights are the same; None for a
            session of its own.
    """

    config: Mapping[str, str] = dataclasses.field(default_factory=dict)
    of: str | None = None


def cpu_sessions(quantized: Quantized | None) -> Mapping[str, Session]:
    """Where both phases have the same kernels, one session packs the weights once for both.

    Scoring is rare, and in float reads the weights as they are mapped.
    """
    if quantized is None:
        return {
            "prefill": Session(),
            "decode": Session(of="prefill"),
            "score": Session({"session.disable_prepacking": "1"}),
            EMBED: Session(),
            NATIVE: Session(),
        }
    if not quantized.weights:  # an int8 cache alone
        score = Session({"session.disable_prepacking": "1"})
        return {"prefill": Session(), "decode": Session(), "score": score, EMBED: Session()}
    same = not quantized.kv_scales and all(rule.prefill == rule.decode for rule in quantized.rules.values())
    # Int8 activations inside the kernel: without them a step of one token of 8 bits takes 50 times as long, of 4 bits
    # little longer, so that kept values of 4 bits are multiplied in float.
    level = "1" if only_kept_fours(quantized) else "4"
    config = {"session.qdq_matmulnbits_accuracy_level": level}
    whole = {phase: config | (EXACT_PRODUCTS if _multiplies_bytes(quantized, phase) else {}) for phase in PHASES}
    return {
        "prefill": Session(whole["prefill"]),
        "decode": Session(whole["decode"], of="prefill" if same else None),
        "score": Session(whole["score"]),
        EMBED: Session(whole["prefill"]),
        PREFILL_INT8: Session(config | EXACT_PRODUCTS),
        DECODE_BLOCKS: Session(config),
        NATIVE: Session(whole["prefill"]),
    }


def _multiplies_bytes(quantized: Quantized, phase: str) -> bool:
    """Whether a phase multiplies int8 weights by activations that the graph quantizes, and may ask for exact products.

    ONNX Runtime cannot load a graph that does if two linear layers share a weight.
    """
    names = [weight.name for _, weight in quantized_products(quantized.model, quantized.weights)]
    return len(set(names)) == len(names) and any(
        ACTIVATIONS[phase](rule) != "float" for rule in quantized.rules.values()
    )


def cuda_sessions(quantized: Quantized | None) -> Mapping[str, Session]:
    """One session for both phases, so that the device holds the weights once."""
    return {"prefill": Session(), "decode": Session(of="prefill"), "score": Session()}


def cann_sessions(quantized: Quantized | None) -> Mapping[str, Session]:
    """Quantized values are folded into float16 weights when a session loads a graph: the device has no operator for
    them."""
    config = {} if quantized is None else {"session.disable_quant_qdq": "1"}
    return {phase: Session(config) for phase in PHASES}
