"""Shows a plan as text or as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from satchel.export.planning.plan import PIPELINE, TENSOR, Plan, Row
from satchel.export.planning.speed import PROMPT
from satchel.runtime.util.terminal import columns, printable

HEADER = (
    "devices", "weights", "memory", "messages", "sent", "latency", "transfer", "decode", "prefill", "",
)  # fmt: skip
UNITS = ("", "GB each", "GB each", "a token", "kB a token", "ms", "ms", "tokens/s", "tokens/s", "")


def as_text(plan: Plan) -> str:
    """The plan as tables, then the verdict."""
    model, machine, network = plan.model, plan.machine, plan.network
    active = ""
    if model.active_parameters < 0.6 * model.parameters:
        active = f", {model.active_parameters / 1e9:.3g} billion for each token"
    states = f", states of {model.states():,} bytes included" if model.states() else ""
    facts = [
        ("model", printable(model.name)),
        ("parameters", f"{model.parameters / 1e9:.3g} billion{active}"),
        ("precision", model.precision),
        ("weights", f"{model.weights() / 1e9:.3g} GB, of which a token reads {model.read() / 1e9:.3g}"),
        ("KV cache", f"{model.cache():,} bytes a token; {plan.rows[0].request / 1e9:.3g} GB a request of "
                     f"{model.context:,} tokens{states}"),
        ("activations", f"{model.activations() / 1e6:.3g} MB"),
        ("device", _device(plan)),
        ("network", f"{network.bandwidth * 8 / 1e9:.3g} Gbit/s, {network.latency * 1e6:.3g} us for a message"),
    ]  # fmt: skip
    lines = columns(facts)
    for way, title in ((TENSOR, "A part of each layer on each device"), (PIPELINE, "Some layers on each device")):
        rows = [_cells(each) for each in plan.rows if each.way == way]
        if rows:
            table = columns([HEADER, UNITS, *rows], tuple(range(9)))
            lines += ["", f"{title} (decode at {plan.length:,} tokens, prefill of {PROMPT:,}):", *table]
    if machine.compute is None:
        lines.append("Prefill is not estimated: --compute has no default where --bandwidth is given.")
    return "\n".join([*lines, "", *plan.verdict])


def _device(plan: Plan) -> str:
    machine = plan.machine
    parts = [f"{machine.bandwidth / 1e9:.3g} GB/s"]
    if machine.compute is not None:
        parts.append(f"{machine.compute / 1e9:.3g} GFLOP/s")
    if machine.int8 is not None:
        parts.append(f"{machine.int8 / 1e9:,.0f} GOP/s in int8")
    if machine.memory is not None:
        parts.append(f"{machine.memory / 1e9:.3g} GB of memory")
    return ", ".join(parts) + (" (this machine, measured)" if machine.measured else "")


def _cells(each: Row) -> tuple[str, ...]:
    return (
        str(each.devices),
        f"{each.weights / 1e9:.3f}",
        f"{each.memory / 1e9:.3f}",
        str(each.messages),
        f"{each.sent / 1e3:,.0f}",
        f"{each.latency * 1e3:.2f}",
        f"{each.transfer * 1e3:.2f}",
        f"{each.decode:.2f}",
        "" if each.prefill is None else f"{each.prefill:.1f}",
        "too large" if each.fits is False else "",
    )


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values: bytes, seconds, tokens per second."""
    model = plan.model
    return {
        "model": model.name,
        "precision": model.precision,
        "parameters": model.parameters,
        "active_parameters": model.active_parameters,
        "weights": model.weights(),
        "read_per_token": model.read(),
        "cache_per_token": model.cache(),
        "states_per_request": model.states(),
        "activations": model.activations(),
        "max_context": model.context,
        "length": plan.length,
        "prompt": PROMPT,
        "device": dataclasses.asdict(plan.machine),
        "network": dataclasses.asdict(plan.network),
        "rows": [dataclasses.asdict(each) for each in plan.rows],
        "verdict": list(plan.verdict),
    }
