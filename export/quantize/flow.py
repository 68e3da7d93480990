"""Runs a graph over windows of text segment by segment, with the weights of one segment in memory at a time.

An export uses it for layer-wise calibration, which reads the inputs of each linear layer and can replace its weight
before the next segment runs, and for the reference logits of the certificate.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.graphs.analysis.segments import Segment, build, split
from satchel.graphs.ir.values import dims
from satchel.graphs.ir.weights import LazyWeight
from satchel.runtime.bundle.contract import ATTENTION_MASK, INPUT_IDS, LOGITS, TEXT_LENGTH
from satchel.runtime.ort.session import default_threads
from satchel.runtime.util.cpu import machine_cores

Inputs = Callable[[], Iterator[NDArray[np.float32]]]
"""Yields the input of a linear layer, [tokens, width], batch by batch; can be called more than once."""

Visit = Callable[[ir.Node, Inputs], Mapping[str, NDArray[Any]]]
"""Called for each node with large weights; returns replacement weights by name for the rest of the flow."""

Observe = Callable[[str, NDArray[Any]], None]

LARGEST_KEPT = 16 << 20
"""Max bytes of a value between segments, of all batches, that is in memory and not in files."""

MAPPED_BYTES = 64 << 20
"""A weight larger than this is written to a file and memory-mapped."""


def _keep(node: ir.Node, inputs: Inputs) -> Mapping[str, NDArray[Any]]:
    return {}


class Flow:
    """A run of a graph over windows of tokens, up to but excluding the LM head.

    Args:
        model: A graph before it is split into phases: logits for every position.
        windows: Token ids [windows, length] int64.
        folder: An empty folder for the large values between segments; only the batch in use is in memory.
        batch: Windows per batch; must divide their number.
        keep: Keep the values between all segments, so that a branch can start in the middle.
    """

    def __init__(
        self, model: ir.Model, windows: NDArray[np.int64], folder: Path, *, batch: int = 1, keep: bool = False
    ) -> None:
        if len(windows) % batch:
            raise ValueError(f"{len(windows)} windows cannot be divided into batches of {batch}")
        self.model = model
        self.folder = folder
        self.batch = batch
        self.batches = len(windows) // batch
        self.length = windows.shape[1]
        self._opsets = dict(model.graph.opset_imports)
        self._keep = keep
        self._values: dict[str, list[Path | NDArray[Any]]] = {}
        ids = windows.reshape(self.batches, batch, self.length)
        self._values[INPUT_IDS] = list(ids)
        self._values[ATTENTION_MASK] = list(np.ones_like(ids))
        self._values[TEXT_LENGTH] = list(np.zeros_like(ids[:, :, :1]))  # the mask is that of the whole text
        self._inputs = {str(v.name): v for v in model.graph.inputs}
        self._head: Segment | None = None
        self._journaled = False
        self._branch = False
        self._sessions: dict[str, ort.InferenceSession] | None = {} if keep else None
        self._confined = machine_cores() > default_threads()  # to fewer cores than there will be threads

    def run(
        self,
        visit: Visit = _keep,
        observe: Observe | None = None,
        observed: Collection[str] = (),
        progress: Callable[[int], object] = lambda done: None,
        first: int = 0,
        journal: Path | None = None,
    ) -> None:
        """Run all but the head.

        Args:
            visit: Called for each node with large weights, in graph order, before it runs.
            observe: Called with each of the `observed` values, batch by batch.
            observed: Names of values, such as the KV caches.
            progress: Called after each segment.
            first: The segment to start at, for a branch of a flow that kept its values.
            journal: A file that says after each segment where the flow is. If it is there already, from an equal flow
                over the same folder, the flow goes on from there.
        """
        segments = split(self.model, [LOGITS, *observed])
        self._head = segments.pop() if segments[-1].weights else None
        self._journaled = journal is not None
        if journal is not None and journal.exists():
            first = self._go_on(journal)
            progress(first)
        for index, segment in list(enumerate(segments))[first:]:
            later = {name for other in segments[index + 1 :] for name in other.reads}
            later |= set(self._head.reads if self._head else ()) | {LOGITS}
            weights = {} if not segment.weights else self._weights(segment, visit)
            self._run(segment, weights, later, observe, observed)
            past = [name for name in self._values if name not in later and (self._branch or not self._keep)]
            if journal is not None:  # before files are removed, so that it never names one that is gone
                self._note(journal, index + 1, past)
            for name in past:
                self._drop(name)
            progress(1)

    def branch(self) -> Flow:
        """Return a flow that starts from the values this one kept, and has its own values in memory.

        Both share the sessions of segments, which take their weights as inputs.
        """
        other = copy.copy(self)
        other._values, other._branch = dict(self._values), True
        return other

    def pieces(self) -> list[str]:
        """Return the name of the first node of each segment, without the head."""
        return [str(segment.head.name) for segment in split(self.model, [LOGITS])[:-1]]

    def logits(self, index: int, replaced: Mapping[str, NDArray[Any]] | None = None) -> NDArray[np.float32]:
        """Return the logits of one batch of windows, [batch, length, vocabulary] float32, after `run`.

        `replaced` are weights by name to take for the head's own.
        """
        if self._head is None:
            return np.asarray(self._load(self._values[LOGITS][index]), np.float32)
        weights = dict(replaced or {})
        weights = {
            name: weights[name] if name in weights else self._materialized(name, lazy)
            for name, lazy in self._head.weights.items()
        }
        (logits,) = self._session(self._head, index).run([LOGITS], self._feeds(self._head, index) | weights)
        return np.asarray(logits, np.float32)

    def head(self) -> tuple[ir.Node, Inputs] | None:
        """The node that multiplies by the head's weight, and its inputs, after `run`; None if that weight is small."""
        if self._head is None or self._head.head.op_type == "MoE":  # the last large weights are those of experts
            return None
        return self._head.head, self._inputs_of(self._head)

    def _inputs_of(self, segment: Segment) -> Inputs:
        """The inputs of the node that reads a segment's large weights."""
        read = (v.name for v in segment.head.inputs if v is not None and v.name in segment.reads)
        name = next((str(name) for name in read if name in self._values), None)

        def inputs() -> Iterator[NDArray[np.float32]]:
            for stored in self._values[str(name)]:
                array = self._load(stored)
                yield array.reshape(-1, array.shape[-1])

        return inputs

    def _weights(self, segment: Segment, visit: Visit) -> dict[str, NDArray[Any]]:
        replaced = dict(visit(segment.head, self._inputs_of(segment)))
        if segment.head.op_type == "Gather":  # reads only the rows that are looked up
            return replaced
        kept = {key: lazy for key, lazy in segment.weights.items() if key not in replaced}
        return {**replaced, **{key: self._materialized(key, lazy) for key, lazy in kept.items()}}

    def _materialized(self, name: str, lazy: LazyWeight) -> NDArray[Any]:
        if lazy.nbytes <= MAPPED_BYTES and not self._keep:  # branches read a weight many times
            return np.ascontiguousarray(lazy.numpy())
        path = self.folder / f"weight-{_file_name(name)}"
        if not path.exists():
            with path.open("wb") as file:
                lazy.tofile(file)
        return np.memmap(path, lazy.dtype.numpy(), "r", shape=lazy.dims)

    def _run(
        self,
        segment: Segment,
        weights: dict[str, NDArray[Any]],
        later: Collection[str],
        observe: Observe | None,
        observed: Collection[str],
    ) -> None:
        lookup = segment.head.op_type == "Gather" and bool(segment.weights)
        session = None
        results: dict[str, list[Path | NDArray[Any]]] = {name: [] for name in segment.keeps if name in later}
        for index in range(self.batches):
            feeds = self._feeds(segment, index)
            if lookup:
                feeds |= _looked_up(segment, feeds, weights)
            if session is None:
                session = self._session_for(segment, feeds | weights, lookup)
            used = {i.name for i in session.get_inputs()}
            found = session.run(list(segment.keeps), {k: v for k, v in (feeds | weights).items() if k in used})
            for name, array in zip(segment.keeps, found, strict=True):
                if name in observed and observe is not None:
                    observe(name, array)
                if name in results:
                    results[name].append(self._store(name, index, array))
        self._values |= results

    def _session(self, segment: Segment, index: int) -> ort.InferenceSession:
        weights = {name: np.empty(0, lazy.dtype.numpy()) for name, lazy in segment.weights.items()}
        return self._session_for(segment, self._feeds(segment, index) | weights, False)

    def _session_for(self, segment: Segment, feeds: Mapping[str, NDArray[Any]], lookup: bool) -> ort.InferenceSession:
        """The session of a segment; a flow that keeps its values keeps its sessions too, for its branches."""
        if self._sessions is None:
            return self._opened(segment, feeds, lookup)
        name = str(segment.head.name)
        if name not in self._sessions:
            self._sessions[name] = self._opened(segment, feeds, lookup)
        return self._sessions[name]

    def _opened(self, segment: Segment, feeds: Mapping[str, NDArray[Any]], lookup: bool) -> ort.InferenceSession:
        if lookup:  # its output is fed as an input
            first = segment.head.outputs[0]
            segment = Segment(segment.nodes[1:], (*segment.reads, str(first.name)), {}, segment.keeps)
        model = build(segment, {name: array.dtype for name, array in feeds.items()}, self._opsets)
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = machine_cores()  # see satchel.export.threads
        if self._confined or self._sessions is not None:  # many sessions would spin at once
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.enable_cpu_mem_arena = self._sessions is None  # many sessions would each keep their largest run's
        return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _feeds(self, segment: Segment, index: int) -> dict[str, NDArray[Any]]:
        feeds = {}
        for name in segment.reads:
            if name in self._values:
                feeds[name] = self._load(self._values[name][index])
            elif name in self._inputs:
                feeds[name] = self._empty_cache(self._inputs[name])
        return feeds

    def _empty_cache(self, value: ir.Value) -> NDArray[np.float32]:
        """A KV cache for the whole text, or the state before it."""
        _, *sizes = dims(value) or [None]
        return np.zeros([self.batch, *(d if isinstance(d, int) else self.length for d in sizes)], np.float32)

    def _note(self, journal: Path, done: int, past: Collection[str]) -> None:
        """Write how many segments are done, and the files of the values that later ones read."""
        files = {
            name: [stored.name for stored in kept if isinstance(stored, Path)]
            for name, kept in self._values.items()
            if name not in past
        }
        part = journal.with_suffix(".part")
        part.write_text(json.dumps({"done": done, "files": {name: given for name, given in files.items() if given}}))
        part.replace(journal)

    def _go_on(self, journal: Path) -> int:
        """Take over the values of a flow that was interrupted; returns the number of its segments that are done."""
        state = json.loads(journal.read_text())
        self._values |= {name: [self.folder / file for file in files] for name, files in state["files"].items()}
        return int(state["done"])

    def _store(self, name: str, index: int, array: NDArray[Any]) -> Path | NDArray[Any]:
        if self._branch or (array.nbytes * self.batches <= LARGEST_KEPT and not self._journaled):
            return array
        path = self.folder / f"{_file_name(name)}-{index}.npy"
        np.save(path, array)
        return path

    def _load(self, stored: Path | NDArray[Any]) -> NDArray[Any]:
        return np.load(stored, mmap_mode="r") if isinstance(stored, Path) else stored

    def _drop(self, name: str) -> None:
        for stored in self._values.pop(name):
            if isinstance(stored, Path) and not self._branch:  # those of a branch are of the flow that it came from
                stored.unlink()


def _looked_up(
    segment: Segment, feeds: Mapping[str, NDArray[Any]], replaced: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Compute the embedding lookup that a segment starts with, reading only the rows needed."""
    table, ids = (str(value.name) for value in segment.head.inputs[:2] if value is not None)
    wanted, places = np.unique(feeds[ids].astype(np.int64), return_inverse=True)
    if table in replaced:
        rows = replaced[table][wanted]
    else:
        rows = np.concatenate([segment.weights[table].rows(int(i), int(i) + 1) for i in wanted])
    return {str(segment.head.outputs[0].name): rows[places.reshape(feeds[ids].shape)]}


def fresh(folder: Path, name: str) -> Path:
    """Create an empty folder called `name` in `folder`."""
    path = folder / name
    path.mkdir(parents=True)
    return path


def _file_name(name: str) -> str:
    return name.replace("/", "_")
