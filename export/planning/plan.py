"""A plan: what a model needs on 1 to 16 devices, how fast it will be, and what follows from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from satchel.export.planning.model import Model
from satchel.export.planning.speed import (
    PROMPT,
    Machine,
    Messages,
    Network,
    decode_seconds,
    pipeline_messages,
    prefill_seconds,
    tensor_messages,
)

MOST_DEVICES = 16
TENSOR, PIPELINE = "tensor", "pipeline"
"""Each device has a part of each layer, or some whole layers."""
GAIN = 1.02
"""More devices are faster only if they are by more than this; estimates are not that exact."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A model on so many devices, in bytes, seconds and tokens per second, each of the device that has most.

    Attributes:
        devices: How many.
        way: TENSOR or PIPELINE; TENSOR for a single device.
        weights: Bytes of weights.
        cache: Bytes of the KV cache for each token of a request.
        request: Bytes of a request at the bundle's context: KV cache and states.
        memory: All of it, one request and activations included.
        fits: Whether that is no more than a device has; None if that is not known.
        messages, sent: Messages of one decode step, one after the other, and bytes sent.
        latency, transfer: Seconds of these that no network bandwidth shortens, and the others.
        decode: Tokens per second of one request.
        prefill: Tokens per second of a prompt of `PROMPT` tokens; None if the device's compute is not known.
    """

    devices: int
    way: str
    weights: int
    cache: int
    request: int
    memory: int
    fits: bool | None
    messages: int
    sent: int
    latency: float
    transfer: float
    decode: float
    prefill: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of a model for a kind of device and a network, decode at `length` tokens, and the verdict in lines."""

    model: Model
    machine: Machine
    network: Network
    length: int
    rows: tuple[Row, ...]
    verdict: tuple[str, ...]


def make_plan(model: Model, machine: Machine, network: Network, length: int, devices: int | None = None) -> Plan:
    """Estimate a model on 1 to 16 devices.

    Args:
        model: The model.
        machine: What each device is.
        network: What connects them.
        length: Tokens in the cache when decode is estimated.
        devices: How many there are; None if the question is how many there should be.
    """
    counts = sorted({*range(1, MOST_DEVICES + 1), devices or 1})
    rows = [row(model, machine, network, length, count, TENSOR) for count in counts if count <= model.most_devices]
    staged = (count for count in counts if 1 < count <= model.layers)
    rows += [row(model, machine, network, length, count, PIPELINE) for count in staged]
    return Plan(model, machine, network, length, tuple(rows), verdict(model, machine, rows, devices))


def row(model: Model, machine: Machine, network: Network, length: int, devices: int, way: str) -> Row:
    """One row; see `Row`."""
    parts, stages = (devices, 1) if way == TENSOR else (1, devices)
    weights, layers = model.weights(parts, stages), model.stage_layers(stages) / model.layers
    cache = round(model.cache(parts) * layers)
    request = cache * model.context + model.states(parts, stages)
    memory = weights + request + model.activations(parts)
    messages = tensor_messages if way == TENSOR else pipeline_messages
    step: Messages = messages(model, devices, network)
    prompt: Messages = messages(model, devices, network, PROMPT)
    prefill = prefill_seconds(model, machine, parts)
    return Row(
        devices, way, weights, cache, request, memory,
        None if machine.memory is None else memory <= machine.memory,
        step.count, round(step.sent), step.latency, step.transfer,
        1 / (decode_seconds(model, machine, length, parts) + step.seconds),
        None if prefill is None else PROMPT / (prefill + prompt.seconds),
    )  # fmt: skip


def verdict(model: Model, machine: Machine, rows: Sequence[Row], devices: int | None) -> tuple[str, ...]:
    """What follows from the rows, in sentences."""
    lines, one = [], rows[0]
    if one.fits is False:
        lines.append(_too_large(machine, rows))
    limit = devices or MOST_DEVICES
    usable = [each for each in rows if each.fits is not False and each.devices <= limit]
    if devices is not None and not any(each.devices == devices and each.fits is not False for each in rows):
        possible = [each for each in rows if each.devices == devices]
        what = "cannot share this model" if not possible else "do not have enough memory for it"
        lines.append(f"{devices} devices {what}.")
    if not usable:
        return tuple(lines)
    fastest = max(each.decode for each in usable)
    best = next(each for each in sorted(usable, key=lambda each: each.devices) if each.decode * GAIN >= fastest)
    if devices is None:
        lines.append(f"Decode is fastest on {_named(best)}: {best.decode:.3g} tokens/s.")
        if best.devices < MOST_DEVICES:
            lines.append("More devices are not faster: messages take longer than what they save.")
    elif best.devices < devices:
        mine = [each for each in rows if each.devices == devices and each.fits is not False]
        if mine:
            given = max(mine, key=lambda each: each.decode)
            lines.append(
                f"{devices} devices decode no faster than {best.devices}: {given.decode:.3g} against {best.decode:.3g} "
                f"tokens/s; messages take {1000 * (given.latency + given.transfer):.3g} ms of each token. "
                f"Use {_named(best)}."
            )
    else:
        single = f", {best.decode / one.decode:.2g} times as many as one" if one.fits and devices > 1 else ""
        lines.append(f"{_named(best).capitalize()}: {best.decode:.3g} tokens/s{single}.")
    if best.way == PIPELINE:
        lines.append(
            "Stages do not speed up one request, which passes through all of them in turn; several keep all busy."
        )
    return tuple(lines)


def _named(each: Row) -> str:
    if each.devices == 1:
        return "1 device"
    return f"{each.devices} devices " + ("that share each layer" if each.way == TENSOR else "with whole layers")


def _too_large(machine: Machine, rows: Sequence[Row]) -> str:
    needed, memory = rows[0].memory / 1e9, (machine.memory or 0) / 1e9
    text = f"It does not fit into {memory:.3g} GB on 1 device: it needs {needed:.3g} GB."
    fitting = sorted((each for each in rows if each.fits), key=lambda each: each.devices)
    if not fitting:
        return f"{text} No number of devices up to {MOST_DEVICES} is enough."
    return (
        f"{text} {_named(fitting[0]).capitalize()} are the fewest that do, with {fitting[0].memory / 1e9:.3g} GB each."
    )
