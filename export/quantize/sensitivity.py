"""What each weight costs in 4 bits: each is rounded alone, and the model's predictions are compared."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from satchel.export.quantize.flow import Flow, Inputs, Visit, fresh
from satchel.export.quantize.gptq import Feedback
from satchel.export.quantize.kept import RoundedWeights
from satchel.export.quantize.observe import BATCH, batched
from satchel.export.quantize.quantize import (
    by_outputs,
    head_moments,
    moments_of,
    quantizable,
    read_by,
    round_weight,
    rules,
    weight_parts,
)
from satchel.export.quantize.scales import fit_grid
from satchel.graphs.ir.values import SMALL
from satchel.graphs.ir.weights import LazyWeight
from satchel.graphs.quant.assign import layers_of
from satchel.graphs.quant.quantized import QuantizedWeight
from satchel.graphs.quant.recipe import BLOCKS, Rule, Scheme

PROBE = Rule(bits=4, blocks=(64, 32, 16))
"""How a weight is stored while its loss is measured: searched scales."""

TRIED_OUTPUTS = 32
"""Outputs of a weight, spread over all, from which the errors of other schemes are estimated."""

TRIED_WINDOWS, TRIED_TOKENS = 2, 128
"""Windows of the text on which weights are tried, spread over all, and the tokens at the start of each that count."""


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """The effect of storing one weight in 4 bits.

    Attributes:
        layers: The checkpoint's layers that are merged into this weight.
        kind: As in recipes: "linear", "head", or "embedding", with a head that is tied to it.
        weights: Its number of weights.
        inputs: Its number of inputs.
        kl: Mean KL divergence in nats from the float model to the model with only this weight stored as `PROBE` says.
        errors: The squared error of the outputs in other schemes and after GPTQ, relative to that of the probe. To
            second order the KL is proportional to it.
    """

    layers: tuple[str, ...]
    kind: str
    weights: int
    inputs: int
    kl: float
    errors: Mapping[Scheme, float]


def schemes_of(inputs: int, kind: str) -> list[Scheme]:
    """The schemes with a fast kernel for float activations that a layer with so many inputs can be stored in."""
    blocks = [block for block in BLOCKS if block > 16 and inputs % block == 0]
    symmetries = (True, False) if kind == "linear" else (True,)
    four = [Scheme(4, block, symmetric) for block in blocks for symmetric in symmetries]
    return four + [Scheme(8, block) for block in blocks]


def measure(
    model: ir.Model,
    windows: NDArray[np.int64],
    folder: Path,
    progress: Callable[[int], object],
) -> list[Sensitivity]:
    """Store each weight of a linear layer or embedding in 4 bits alone, and compare the logits.

    Weights that no rule stores in fewer bits than float are left out, and so are those that no group size divides.

    Args:
        model: The graph that all phases share, its weights marked with their rules.
        windows: Text, [windows, length]. The moments of inputs are those of all of it; `TRIED_TOKENS` of each of
            `TRIED_WINDOWS` are what weights are tried on.
        folder: A folder to create, for temporary files.
        progress: Called after each piece of work, of which there are `count(model)`.

    Returns:
        The weights in graph order.
    """
    errors = _errors(model, windows, fresh(folder, "observed"), progress)
    spread = np.linspace(0, len(windows) - 1, min(TRIED_WINDOWS, len(windows))).round().astype(int)
    tried = windows[spread, :TRIED_TOKENS]
    flow = Flow(model, tried, fresh(folder, "float"), batch=len(tried), keep=True)
    flow.run()
    head = flow.head()
    last = "" if head is None else str(head[0].name)
    compared = _Compared(flow)
    places = {name: index for index, name in enumerate(flow.pieces())}
    found = []
    for node, lazy in _measured(model):
        name, inputs = str(node.name), _inputs(node, lazy)
        first, kind = places.get(name), "linear"
        if node.op_type == "Gather":
            kind = "embedding"
        elif name == last:
            kind = "head"
        work = fresh(folder, "tried")
        rounded = _values(round_weight(lazy, PROBE, RoundedWeights(work / "codes"), by_outputs=by_outputs(node)), node)
        weight = {lazy.name: rounded}
        branch = flow
        if first is not None:
            branch = flow.branch()
            branch.run(_replacing(name, weight), first=first)
        kl = compared.divergence(branch, weight)
        found.append(Sensitivity(layers_of(lazy), kind, lazy.size, inputs, kl, errors[lazy.name]))
        shutil.rmtree(work)
        progress(1)
    return found


def count(model: ir.Model) -> int:
    """Return the pieces of work that `measure` reports: two for each weight."""
    return 2 * len(_measured(model))


def _measured(model: ir.Model) -> list[tuple[ir.Node, LazyWeight]]:
    chosen = rules(model)
    found, seen = [], set[str]()
    for node, lazy in quantizable(model):
        inputs = _inputs(node, lazy)
        fits = node.op_type != "MoE" and lazy.nbytes > SMALL and any(inputs % b == 0 for b in (64, 32))
        if lazy.name in chosen and lazy.name not in seen and fits:
            seen.add(lazy.name)
            found.append((node, lazy))
    return found


def _values(quantized: QuantizedWeight, node: ir.Node) -> NDArray[np.float32]:
    """The values of a rounded weight in the shape that the graph has it in."""
    values = quantized.grid.values(quantized.codes.astype(np.int16))
    return values if by_outputs(node) else np.ascontiguousarray(values.T)


def _errors(
    model: ir.Model, windows: NDArray[np.int64], folder: Path, progress: Callable[[int], object]
) -> dict[str, dict[Scheme, float]]:
    """The errors of each weight's outputs in other schemes, relative to those in the probe's, by the weight's name."""
    readers = {str(node.name): (node, lazy) for node, lazy in _measured(model)}
    found: dict[str, dict[Scheme, float]] = {}

    def observe(node: ir.Node, inputs: Inputs) -> Mapping[str, NDArray[Any]]:
        if node.op_type == "MatMul" and str(node.name) in readers:
            _, lazy = readers[str(node.name)]
            whole = np.ascontiguousarray(lazy.numpy())
            step = max(1, whole.shape[1] // TRIED_OUTPUTS)
            rows = np.ascontiguousarray(whole[:, ::step].T)
            found[lazy.name] = _relative(rows, "linear", Feedback(moments_of(inputs)))
            progress(1)
            return {lazy.name: whole}
        return {}

    flow = Flow(model, batched(windows), folder, batch=BATCH)
    flow.run(observe)
    head = flow.head()
    for node, lazy in readers.values():
        if lazy.name not in found:
            feedback, kind = None, "embedding"
            if (read := read_by(lazy, head)) is not None:
                kind = "embedding" if by_outputs(node) else "head"
                feedback = Feedback(head_moments(read, by_outputs(node)))
            inputs = _inputs(node, lazy)
            step = max(1, lazy.size // inputs // TRIED_OUTPUTS)
            rows = np.concatenate([part[::step] for _, part in weight_parts(lazy, by_outputs(node), inputs)])
            found[lazy.name] = _relative(rows, kind, feedback)
            progress(1)
    return found


def _relative(rows: NDArray[np.float32], kind: str, feedback: Feedback | None) -> dict[Scheme, float]:
    """The errors of some outputs [outputs, inputs] as GPTQ leaves them, without `feedback` as searched scales do, over
    those in the probe."""
    inputs = rows.shape[1]
    used = None if feedback is None else feedback.squares

    def difference(scheme: Scheme, importance: NDArray[np.float32] | None) -> NDArray[np.float32]:
        grid = fit_grid(rows, scheme, importance)
        return grid.values(grid.round(rows)) - rows

    def error(scheme: Scheme) -> float:
        squares = np.square(difference(scheme, used))
        return float((squares if feedback is None else squares * feedback.importance).sum(dtype=np.float64))

    probe = PROBE.scheme(inputs)
    if probe is None:
        raise ValueError("the probe stores weights in float")
    alone = difference(probe, None)
    base = float(np.square(alone).sum(dtype=np.float64)) if feedback is None else feedback.error(alone)
    return {scheme: error(scheme) / base if base > 0 else 1.0 for scheme in schemes_of(inputs, kind)}


def _inputs(node: ir.Node, lazy: LazyWeight) -> int:
    return lazy.dims[-1] if by_outputs(node) else lazy.dims[0]


def _replacing(name: str, weight: Mapping[str, NDArray[np.float32]]) -> Visit:
    return lambda node, inputs: weight if node.name == name else {}


class _Compared:
    """Compares logits with those of a flow, whose probabilities are computed once."""

    def __init__(self, flow: Flow) -> None:
        self._expected = []
        for index in range(flow.batches):
            path = flow.folder / f"expected-{index}.npy"
            logits = torch.from_numpy(flow.logits(index)).flatten(0, 1)
            probabilities = torch.softmax(logits, -1)
            np.save(path, probabilities.numpy())
            self._expected.append((path, _cross_entropy(probabilities, logits)))

    def divergence(self, branch: Flow, replaced: Mapping[str, NDArray[np.float32]]) -> float:
        """Mean KL(flow || branch) over all positions."""
        total, positions = 0.0, 0
        for index, (path, entropy) in enumerate(self._expected):
            logits = torch.from_numpy(branch.logits(index, replaced)).flatten(0, 1)
            probabilities = torch.from_numpy(np.load(path))
            total += float((_cross_entropy(probabilities, logits) - entropy).sum())
            positions += len(logits)
        return max(total / positions, 0.0)


def _cross_entropy(probabilities: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """That of each position, [positions] float64."""
    shifted = logits - logits.max(-1, keepdim=True).values
    return torch.logsumexp(shifted, -1).double() - (probabilities * shifted).sum(-1).double()
