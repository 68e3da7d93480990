"""Estimates the time of a token on one device and on several, from bytes to read, sums to compute and messages.

A decode step reads all weights that a token needs once, and computes little, so its time on one device is

    weights / (REACHED x bandwidth) + KV cache and states / (CACHE_REACHED x bandwidth) + layers x LAYER_SECONDS

in bytes (the memory side of the roofline of Williams, Waterman and Patterson, CACM 52(4), 2009, and a cost of each
layer's kernels that does not depend on their size; docs/planning.md has the measurements of the constants). A prompt of
T tokens reads the weights once, too, and computes

    2 x weights of layers x T + 2 x T^2 x width of queries x layers

operations; its time is the longer one of both. Where the speed of satchel's int8 kernels is known, the first term has
it, and the second that of float32.

On N devices with parts of each layer (Megatron-LM, Shoeybi et al., arXiv 1909.08053) each reads its part, and a layer
ends its attention and its feed-forward part with an all-reduce of `hidden` float32 numbers for each token. An
all-reduce of B bytes takes the shorter one of (Thakur, Rabenseifner and Gropp, IJHPCA 19(1), 2005, section 4.5; what
MPI libraries do)

    recursive doubling:   s x latency + s x B / network
    Rabenseifner:        2 s x latency + 2 (N - 1) / N x B / network         with s = floor(log2 N)

and, where N is no power of 2, two more steps of B bytes, in which the devices beyond it hand over theirs and get the
sum. The head's logits are gathered: ceil(log2 N) x latency + (N - 1) / N x B / network. A table of tokens that is cut
by rows takes one all-reduce more.

Where weights are quantized, all devices hand each other what they have of the input and of the result of such a layer
in place of a sum: two gathers, to all, each of ceil(log2 N) x latency + (N - 1) / N x B / network (the same, section
4.1).

On M devices with whole layers each (a pipeline), one token passes through all in turn: the time of one device, and
M - 1 messages of `hidden` numbers, and one with the logits back to the first.
"""

from __future__ import annotations

import dataclasses
import math

from satchel.export.planning.model import Model
from satchel.export.planning.shape import FLOAT_BYTES

REACHED, CACHE_REACHED = 0.8, 0.6
"""The parts of the memory bandwidth at which kernels read weights and the KV cache."""

LAYER_SECONDS = 25e-6
"""Of each layer of a decode step, beyond what it reads."""

PREFILL_REACHED = {"fp32": 0.75, "fp16": 0.55, "int8": 0.9, "a8w8": 0.9, "a16w8": 0.85, "int4": 0.85, "a16w4": 0.85}
"""Operations per second of prefill, as a part of those of a float32 matrix product on the same processor."""

INT8_REACHED = {"int8": 0.8, "a8w8": 0.8, "int4": 0.65}
"""The same of linear layers on satchel's kernels, as a part of the speed that these reach with int8 weights."""

ATTENTION_REACHED = 1.0
"""Then those of attention have a part of their own, of the speed of a float32 matrix product."""

PROMPT = 512
"""Tokens of the prompt for which prefill is estimated."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """One device: bytes of memory per second, floating-point operations per second in float32, bytes of memory.

    None for what is not known. `measured` says that it is this machine; then `int8` are operations per second of
    satchel's linear layers with int8 weights, where its kernels run.
    """

    bandwidth: float
    compute: float | None = None
    memory: float | None = None
    measured: bool = False
    int8: float | None = None


@dataclasses.dataclass(frozen=True)
class Network:
    """Bytes per second of one link, and seconds until a message of no length arrives."""

    bandwidth: float
    latency: float


@dataclasses.dataclass(frozen=True)
class Messages:
    """What one device does on the network: messages in turn, bytes sent, seconds of latency and of transfer."""

    count: int = 0
    sent: float = 0.0
    latency: float = 0.0
    transfer: float = 0.0

    @property
    def seconds(self) -> float:
        return self.latency + self.transfer

    def __add__(self, other: Messages) -> Messages:
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Messages(*(a + b for a, b in zip(mine, theirs, strict=True)))

    def __mul__(self, times: int) -> Messages:
        return Messages(*(times * value for value in dataclasses.astuple(self)))


def _messages(steps: int, sent: float, network: Network) -> Messages:
    return Messages(steps, sent, steps * network.latency, sent / network.bandwidth)


def all_reduce(size: float, devices: int, network: Network) -> Messages:
    """A sum of `size` bytes over all devices, which each has afterwards, by the faster one of two algorithms."""
    if devices == 1:
        return Messages()
    steps = devices.bit_length() - 1
    more = 0 if devices == 1 << steps else 2
    doubling = _messages(steps + more, (steps + more) * size, network)
    halves = _messages(2 * steps + more, (2 * (devices - 1) / devices + more) * size, network)
    return min(doubling, halves, key=lambda found: found.seconds)


def gather(size: float, devices: int, network: Network) -> Messages:
    """`size` bytes, of which each device has an equal part, brought to one of them, or to all."""
    if devices == 1:
        return Messages()
    return _messages(math.ceil(math.log2(devices)), (devices - 1) / devices * size, network)


def tensor_messages(model: Model, devices: int, network: Network, tokens: int = 1) -> Messages:
    """The messages of a run of `tokens` tokens where each device has a part of each layer, logits of one included."""
    if devices == 1:
        return Messages()
    width = FLOAT_BYTES * model.hidden * tokens
    sums = max(model.reductions - len(model.joined), 0) + model.embedding_reductions
    found = all_reduce(width, devices, network) * sums + gather(FLOAT_BYTES * model.vocabulary, devices, network)
    for inner in model.joined:
        found += gather(FLOAT_BYTES * inner * tokens, devices, network) + gather(width, devices, network)
    return found


def pipeline_messages(model: Model, stages: int, network: Network, tokens: int = 1) -> Messages:
    """The messages of a run of `tokens` tokens through stages with whole layers: those of all stages together."""
    if stages == 1:
        return Messages()
    passed = _messages(1, FLOAT_BYTES * model.hidden * tokens, network) * (stages - 1)
    return passed + _messages(1, FLOAT_BYTES * model.vocabulary, network)


def decode_seconds(model: Model, machine: Machine, length: int, devices: int = 1) -> float:
    """Seconds of a decode step of one sequence at `length` tokens, without messages."""
    kept = model.cache_read(length, devices) + model.states(devices)
    read = model.read(devices) / REACHED + kept / CACHE_REACHED
    return read / machine.bandwidth + model.layers * LAYER_SECONDS


def prefill_seconds(model: Model, machine: Machine, devices: int = 1, tokens: int = PROMPT) -> float | None:
    """Seconds of the prefill of a prompt, without messages; None where the device's compute is not known."""
    if machine.compute is None:
        return None
    weights = model.active_parameters - model.hidden * model.vocabulary  # the head has one token
    sums, attention, own = 2 * weights * tokens, model.attention_sums(tokens), INT8_REACHED.get(model.precision)
    if machine.int8 is None or own is None:
        seconds = (sums + attention) / (machine.compute * PREFILL_REACHED[model.precision])
    else:
        seconds = sums / (machine.int8 * own) + attention / (machine.compute * ATTENTION_REACHED)
    read = model.read(devices) / REACHED / machine.bandwidth
    return max(seconds / devices, read) + model.layers * LAYER_SECONDS
