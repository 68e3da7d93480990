"""Static graphs as a bundle holds them: written without the checks of a whole export, and stepped by their contract."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from support.families import FAMILIES, save

from satchel.export.checkpoint import Checkpoint
from satchel.export.compile import lower, open_source, trace_source
from satchel.export.config import ExportConfig
from satchel.export.stages import Stages
from satchel.export.writing.bundle_writer import write_bundle
from satchel.export.writing.checked_graphs import check_logits
from satchel.export.writing.provenance import source_records
from satchel.export.writing.static_graphs import lower_static
from satchel.graphs.analysis.cut import INLINE_LIMIT
from satchel.graphs.ir.inputs import Lengths
from satchel.graphs.ir.pipeline import Step
from satchel.graphs.quant.quantized import Quantized
from satchel.graphs.targets.steps import cann_steps
from satchel.graphs.targets.targets import TARGETS, Target
from satchel.runtime.bundle.dtypes import DTYPES
from satchel.runtime.bundle.graph_specs import GraphSpec, StaticGraph
from satchel.runtime.bundle.manifest import Manifest

HIDDEN = -30000.0
"""What stands in a mask where a token does not see a position."""


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A checkpoint with the graph that all phases share, and what the passes did so far."""

    checkpoint: Checkpoint
    common: ir.Model
    report: list[dict[str, Any]]


def lowered(checkpoint: Path, config: ExportConfig) -> Lowered:
    """Trace a checkpoint and run the passes that all graphs share."""
    opened = open_source(checkpoint, config)
    return Lowered(opened, *lower(trace_source(opened, config), opened, config))


def lowered_family(name: str, places: pytest.TempPathFactory) -> ir.Model:
    """The graph that all phases of one of `FAMILIES` share, for the CPU."""
    config = ExportConfig(Path("unused"), precision="fp32", max_context=FAMILIES[name].context)
    return lowered(save(FAMILIES[name], places.mktemp(name) / "checkpoint"), config).common


def write_static(checkpoint: Path | Lowered, config: ExportConfig, limit: int = INLINE_LIMIT) -> Manifest:
    """Write a float checkpoint as static graphs into the folder `config.output`, which is made."""
    known = lowered(checkpoint, config) if isinstance(checkpoint, Path) else checkpoint
    report = list(known.report)
    models = lower_static(known.common, known.checkpoint, config, None, report, limit)
    check_logits(models, known.checkpoint)
    config.output.mkdir(parents=True)
    records = partial(source_records, known.checkpoint)
    return write_bundle(config.output, known.checkpoint, config, models, None, report, records, Stages(False).bytes)


def in_float32() -> dict[str, Target]:
    """The targets, cann without the pass that rounds: the form of its graphs can be held to float32's precision."""

    def steps(lengths: Lengths, quantized: Quantized | None, custom: tuple[Step, ...]) -> tuple[Step, ...]:
        return tuple(step for step in cann_steps(lengths, quantized, custom) if step.name != "compute_float16")

    return {**TARGETS, "cann": dataclasses.replace(TARGETS["cann"], static=steps)}


def graphs_of(manifest: Manifest) -> dict[str, StaticGraph]:
    """All graphs of a bundle, prefill by its lengths."""
    static = manifest.static
    assert static is not None
    return {f"prefill {g.tokens}": g for g in static.prefill} | {"decode": static.decode, "score": static.score}


def session(folder: Path, part: GraphSpec, saved: Path | None = None) -> ort.InferenceSession:
    """One part in ONNX Runtime as the manifest says, at the level that runs before a provider sees the graph.

    `saved` takes the graph that this level leaves.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    for key, value in part.session.items():
        options.add_session_config_entry(key, value)
    if saved is not None:
        options.optimized_model_filepath = str(saved)
    return ort.InferenceSession(folder / part.file, options, providers=["CPUExecutionProvider"])


def optimized(folder: Path, part: GraphSpec, place: Path) -> onnx.ModelProto:
    """The graph that a provider sees: after level BASIC, with the manifest's entries."""
    file = place / f"{part.file}.saved.onnx"
    session(folder, part, file)
    return onnx.load(file, load_external_data=False)


@dataclasses.dataclass
class Stepper:
    """Steps through the graphs of one bundle: what a runner does with them, written down plainly.

    Attributes:
        folder: The bundle.
        manifest: Its manifest.
        length: Positions that are written.
        cache: Past by name, as it is after the last step.
    """

    folder: Path
    manifest: Manifest

    def __post_init__(self) -> None:
        self.sessions = {
            (name, index): session(self.folder, part)
            for name, graph in graphs_of(self.manifest).items()
            for index, part in enumerate(graph.parts)
        }
        assert self.manifest.static is not None
        self.static = self.manifest.static
        self.tables = {table.input: self._table(table) for table in self.static.tables}
        self.reset()

    def _table(self, table: object) -> NDArray[np.generic]:
        file, offset, dtype, shape = table.file, table.offset, table.dtype, table.shape  # type: ignore[attr-defined]
        data = (self.folder / file).read_bytes()[offset : offset + int(np.prod(shape)) * DTYPES[dtype].nbytes]
        return np.frombuffer(data, dtype).reshape(shape)

    def reset(self) -> None:
        """An empty cache."""
        self.length = 0
        layers, capacity, dtype = self.manifest.kv_cache.layers, self.static.capacity, self.manifest.kv_cache.dtype
        self.cache = {}
        for layer in layers:
            # Rows that nobody wrote must not matter, so they are no zeros.
            self.cache[layer.past_key] = np.full((1, layer.kv_heads, capacity, layer.key_dim), 9, dtype)
            self.cache[layer.past_value] = np.full((1, layer.kv_heads, capacity, layer.value_dim), -9, dtype)

    def step(self, name: str, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Feed up to as many ids as the graph takes; logits of the last one, for score of all: [rows, vocabulary]."""
        graph, count, capacity = graphs_of(self.manifest)[name], len(ids), self.static.capacity
        padded = np.zeros(graph.tokens, np.int64)
        padded[:count] = ids
        positions = np.minimum(self.length + np.arange(graph.tokens), capacity - 1)
        keys = np.arange(capacity)
        values: dict[str, NDArray[np.generic]] = {
            "input_ids": padded[None],
            "cache_rows": ((keys >= self.length) & (keys < self.length + count)).reshape(1, 1, capacity, 1),
            "cache_index": np.clip(keys - self.length, 0, graph.tokens - 1),
            "last_token": np.asarray([count - 1]),
            **{name: table[positions][None] for name, table in self.tables.items()},
            **self.cache,
        }
        for mask, window in self.static.masks.items():
            seen = (keys <= positions[:, None]) & (keys > positions[:, None] - (window or capacity + 1))
            values[mask] = np.where(seen, 0.0, HIDDEN)[None, None]
        for index, part in enumerate(graph.parts):
            feeds = {t.name: values[t.name].astype(t.dtype) for t in part.inputs}
            assert {t.name: t.shape for t in part.inputs} == {n: a.shape for n, a in feeds.items()}
            names = [t.name for t in part.outputs]
            values |= dict(zip(names, self.sessions[name, index].run(names, feeds), strict=True))
        for layer in self.manifest.kv_cache.layers:
            self.cache[layer.past_key] = values[layer.present_key]
            self.cache[layer.past_value] = values[layer.present_value]
        self.length += count
        logits = values["logits"][0]
        assert logits.dtype == np.float32
        return logits[:count] if name == "score" else logits

    def prefill(self, ids: NDArray[np.int64], tokens: int) -> NDArray[np.float32]:
        """Feed a prompt in chunks of the graph for `tokens`, the last one padded; the last token's logits."""
        logits = np.empty(0, np.float32)
        for start in range(0, len(ids), tokens):
            logits = self.step(f"prefill {tokens}", ids[start : start + tokens])[0]
        return logits
