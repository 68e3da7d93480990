"""Runs a bundle under ONNX Runtime's profiler, and sums up the time of prefill and decode."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import PromptError, SatchelError
from satchel.runtime.execution.engine import Engine, open_engine
from satchel.runtime.generation.sampling.greedy import greedy
from satchel.runtime.ort.session import SessionSettings
from satchel.runtime.tools.profiling.ort_profile import AFTER, BEFORE, Kernel, Place, Run, place_kernels, read_runs

PROFILED = ("prefill", "decode")
PREFILL_PASSES = 3  # one prompt is too few runs for a mean
WARM_UP_TOKENS = 2  # decode steps
US_PER_MS = 1000
# Entries of a kernel that go into the trace; the others are memory counters.
TRACE_FACTS = ("provider", "node_index", "input_type_shape", "output_type_shape", "parameter_size", "activation_size")


@dataclass(frozen=True)
class Recording:
    """The runs of one phase: `steps` prompts or tokens, each of the same number of runs."""

    steps: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class _Ran:
    """A run of a session; `counts` is False for warm-up runs."""

    phase: str
    counts: bool
    session: ort.InferenceSession


@dataclass(frozen=True)
class OperatorTime:
    """All kernels of one type: how many, and their milliseconds, per step; `share` is of the phase's `ms`."""

    operator: str
    count: float
    ms: float
    share: float


@dataclass(frozen=True)
class LayerTime:
    """All kernels of one layer, or of those "before" or "after" the layers, as `OperatorTime`."""

    layer: int | str
    ms: float
    share: float


@dataclass(frozen=True)
class NodeTime:
    """One node, as `OperatorTime`."""

    name: str
    operator: str
    layer: int | str
    ms: float
    share: float


@dataclass(frozen=True)
class PhaseProfile:
    """The time of a phase. A step is the whole prompt in prefill and one token in decode.

    Figures are means over `steps` steps, each of `runs` runs of the graph. Per step, `ms` is the time of its runs in
    milliseconds and `kernels_ms` that of their kernels; the rest is time between kernels, including the cost of the
    profiler. `by_name` and `by_position` are the shares of kernel time that were assigned to a layer by the name of the
    node or by its neighbors. Tables are sorted by time, layers by number.
    """

    steps: int
    runs: int
    ms: float
    kernels_ms: float
    by_name: float
    by_position: float
    operators: tuple[OperatorTime, ...]
    layers: tuple[LayerTime, ...]
    nodes: tuple[NodeTime, ...]


def record(bundle: Bundle, settings: SessionSettings, prompt_tokens: int, new_tokens: int) -> dict[str, Recording]:
    """Run and record a prompt of `prompt_tokens` random ids, three times, and then `new_tokens` greedy tokens.

    A prompt and two tokens are run first as a warm-up. Profiles are written to a temporary folder. Raises PromptError
    for a workload that does not fit the bundle, BundleError and ProviderError as `Engine`, and SatchelError if the
    profiler did not record every run.
    """
    if prompt_tokens < 1 or new_tokens < 1:
        raise PromptError("--prompt-tokens and --new-tokens must be 1 or more")
    with tempfile.TemporaryDirectory(prefix="satchel-profile-") as folder:
        engine = open_engine(bundle, dataclasses.replace(settings, profile=Path(folder) / "session"))
        history = _work(engine, prompt_tokens, new_tokens)
        recorded = _split(engine.end_profiling(), history)
    steps = {"prefill": PREFILL_PASSES, "decode": new_tokens}
    return {phase: Recording(steps[phase], tuple(recorded[phase])) for phase in PROFILED}


def summarize(recording: Recording, layers: int, top: int) -> PhaseProfile:
    """The figures of one phase of a model with that many layers, with its `top` slowest nodes."""
    steps = recording.steps
    total = sum(run.duration for run in recording.runs) / steps / US_PER_MS
    placed = [
        (kernel, place)
        for run in recording.runs
        for kernel, place in zip(run.kernels, _places(run, layers), strict=True)
    ]
    operators: dict[str, list[float]] = defaultdict(list)
    by_layer: dict[int | str, list[float]] = defaultdict(list)
    by_node: dict[tuple[str, str, int | str], list[float]] = defaultdict(list)
    for kernel, place in placed:
        ms = kernel.duration / steps / US_PER_MS
        operators[kernel.operator].append(ms)
        by_layer[place.layer].append(ms)
        by_node[kernel.name, kernel.operator, place.layer].append(ms)
    share = 1 / max(total, 1e-9)
    nodes = [NodeTime(*key, sum(times), sum(times) * share) for key, times in by_node.items()]
    kinds = [OperatorTime(key, len(times) / steps, sum(times), sum(times) * share) for key, times in operators.items()]
    rows = [LayerTime(key, sum(times), sum(times) * share) for key, times in by_layer.items()]
    kernels = sum(row.ms for row in rows)
    return PhaseProfile(
        steps=steps,
        runs=len(recording.runs) // steps,
        ms=total,
        kernels_ms=kernels,
        by_name=_part(placed, by_name=True),
        by_position=_part(placed, by_name=False),
        operators=tuple(sorted(kinds, key=lambda row: -row.ms)),
        layers=tuple(sorted(rows, key=lambda row: _order(row.layer))),
        nodes=tuple(sorted(nodes, key=lambda row: -row.ms)[:top]),
    )


def trace(recordings: Mapping[str, Recording], layers: int) -> str:
    """The recorded runs as JSON in Chrome's trace format: a process per phase, one after another.

    Each kernel is an event with the name of its node and its operator as category, below an event for its run.
    """
    events: list[dict[str, Any]] = []
    offset = 0
    for number, (phase, recording) in enumerate(recordings.items(), start=1):
        who = {"pid": number, "tid": 1}
        events.append({"name": "process_name", "ph": "M", **who, "args": {"name": phase}})
        events.append({"name": "process_sort_index", "ph": "M", **who, "args": {"sort_index": number}})
        events.append({"name": "thread_name", "ph": "M", **who, "args": {"name": "runs and kernels"}})
        shift = offset - recording.runs[0].start
        for index, run in enumerate(recording.runs, start=1):
            span = {"ph": "X", "ts": run.start + shift, "dur": run.duration, **who}
            events.append({"name": f"{phase} run {index}", "cat": "run", **span, "args": {}})
            for kernel, place in zip(run.kernels, _places(run, layers), strict=True):
                span = {"ph": "X", "ts": kernel.start + shift, "dur": kernel.duration, **who}
                facts = {key: kernel.facts[key] for key in TRACE_FACTS if key in kernel.facts}
                facts = {"operator": kernel.operator, "layer": place.layer, **facts}
                events.append({"name": kernel.name, "cat": kernel.operator, **span, "args": facts})
        last = recording.runs[-1]
        offset = last.start + last.duration + shift
    return "[\n" + ",\n".join(json.dumps(event) for event in events) + "\n]\n"


def _work(engine: Engine, prompt_tokens: int, new_tokens: int) -> list[_Ran]:
    """Run the workload. Returns all runs of sessions, in order."""
    ids = np.random.default_rng(0).integers(0, engine.vocabulary, prompt_tokens)
    history: list[_Ran] = []
    warm_up = min(WARM_UP_TOKENS, new_tokens)
    for counts, steps in ((False, warm_up), *[(True, 0)] * (PREFILL_PASSES - 1), (True, new_tokens)):
        state = engine.new_state(prompt_tokens + new_tokens)
        for span in engine.spans(prompt_tokens):
            logits = engine.prefill(state, ids[span])
            history += [_Ran("prefill", counts, each) for each in engine.sessions_for(span.stop - span.start)]
        for _ in range(steps):
            logits = engine.decode(state, greedy(logits))
            history += [_Ran("decode", counts, each) for each in engine.sessions_for(None)]
    return history


def _split(files: Mapping[ort.InferenceSession, Path], history: Sequence[_Ran]) -> dict[str, list[Run]]:
    """The runs that count, by phase, in the order of `history`, from the profile of each session."""
    recorded: dict[str, list[Run]] = {phase: [] for phase in PROFILED}
    runs = {session: read_runs(path) for session, path in files.items()}
    for session, found in runs.items():
        wanted = sum(ran.session is session for ran in history)
        # The profiler stops after a million events.
        if len(found) != wanted or not all(run.kernels for run in found):
            raise SatchelError(
                f"ONNX Runtime's profiler recorded {len(found)} of {wanted} runs: lower --prompt-tokens or --new-tokens"
            )
    following = {session: iter(found) for session, found in runs.items()}
    for ran in history:
        run = next(following[ran.session])
        if ran.counts:
            recorded[ran.phase].append(run)
    several = {phase: len({id(ran.session) for ran in history if ran.phase == phase}) > 1 for phase in PROFILED}
    return {phase: _end_to_end(found) if several[phase] else found for phase, found in recorded.items()}


def _end_to_end(runs: Sequence[Run]) -> list[Run]:
    """Runs of several sessions, with different clocks, shifted so that each begins when the last one ended."""
    placed: list[Run] = []
    for run in runs:
        shift = placed[-1].start + placed[-1].duration - run.start if placed else 0
        kernels = tuple(dataclasses.replace(kernel, start=kernel.start + shift) for kernel in run.kernels)
        placed.append(Run(run.start + shift, run.duration, kernels))
    return placed


def _places(run: Run, layers: int) -> list[Place]:
    return place_kernels([kernel.name for kernel in run.kernels], layers)


def _part(placed: Sequence[tuple[Kernel, Place]], by_name: bool) -> float:
    """The share of kernel time in layers that was placed by name, or by position."""
    total = sum(kernel.duration for kernel, _ in placed)
    part = sum(kernel.duration for kernel, place in placed if isinstance(place.layer, int) and place.by_name == by_name)
    return part / max(total, 1)


def _order(layer: int | str) -> tuple[int, int]:
    return (0, layer) if isinstance(layer, int) else ({BEFORE: -1, AFTER: 1}[layer], 0)
