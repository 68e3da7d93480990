"""The story of an export: open, trace, run the passes, write, check, publish."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from satchel.export.bind import bind
from satchel.export.bundle_writer import (
    WEIGHTS_NAME,
    lay_out,
    record,
    tensor_specs,
    write_companions,
    write_graph,
    write_json,
    write_weights,
)
from satchel.export.checkpoint import Checkpoint, open_checkpoint, open_module
from satchel.export.config import ExportConfig
from satchel.export.errors import ExportError
from satchel.export.families import check_family
from satchel.export.forecast import check_disk, forecast
from satchel.export.genai_config import genai_config
from satchel.export.publish import check_target, staged
from satchel.export.soundness import check_sound
from satchel.export.stages import Stages
from satchel.export.stand_ins import IMPLEMENTATION, register_implementations
from satchel.export.trace import trace
from satchel.graphs import pipeline, signature
from satchel.graphs.contract import PassError
from satchel.graphs.pipeline import Done
from satchel.graphs.targets import NORMALISE, PHASES, TARGETS
from satchel.runtime.manifest import (
    MANIFEST_NAME,
    CacheLayer,
    CacheSpec,
    CorpusEntry,
    FileRecord,
    Graphs,
    GraphSpec,
    Manifest,
    ModelFacts,
    Source,
    TokenizerSpec,
)

PACKAGES = ("satchel", "torch", "transformers", "onnx-ir", "onnxscript", "onnxruntime")
"""Whose versions the manifest records."""


def export_bundle(source: str | Path | torch.nn.Module, config: ExportConfig, *, progress: bool = False) -> Manifest:
    """Compile a checkpoint into a bundle at `config.output`.

    Args:
        source: A Hugging Face folder, a GGUF file, `file.py:factory`, or a module that follows the protocol.
        config: Where to and how.
        progress: Print the forecast, the stages and the result to standard error.

    Returns:
        The bundle's manifest.

    Raises:
        ExportError: The checkpoint or an option cannot be used; nothing is left behind.
    """
    stages = Stages(progress)
    check_target(config.output, config.force)
    with stages.stage("opening the checkpoint"):
        register_implementations()
        checkpoint = _open(source, config)
        check_family(checkpoint)
    context = config.context(checkpoint.max_context)
    needed = forecast(checkpoint, config.precision, _layers(checkpoint) or 1)
    stages.say(
        f"{checkpoint.name}: {_parameters(checkpoint) / 1e6:,.1f} M parameters, context {context:,}; "
        f"export needs {needed}"
    )
    check_disk(needed, config.output)
    with stages.stage("tracing the model"):
        traced = trace(checkpoint.module, checkpoint.name, context, protocol=checkpoint.kind == "module")
        model = bind(traced, checkpoint.weights, checkpoint.name)
    with stages.stage("optimising the graphs"):
        models, report = lower(model, config, checkpoint)
    with staged(config.output) as folder:
        with stages.stage("writing the weights"):
            manifest = _write(folder, checkpoint, config, models, report, stages)
        with stages.stage("checking the bundle"):
            _self_check(folder)
    return manifest


def lower(
    model: ir.Model, config: ExportConfig, checkpoint: Checkpoint
) -> tuple[dict[str, ir.Model], list[dict[str, Any]]]:
    """Run the target's passes over the traced graph.

    Returns:
        The graph of each phase, and the report of all passes for the manifest.

    Raises:
        ExportError: The model is no decoder that a KV cache can serve, or a layer has no form on the target.
    """
    target = TARGETS[config.target]
    try:
        normal, done = pipeline.run(model, NORMALISE)
        check_sound(normal, checkpoint.name, _layers(checkpoint))
        common, more = pipeline.run(normal, target.common[len(NORMALISE) :])
        report = _report("common", [*done, *more])
        left = [r.reason for d in more if d.name == "expand_attention" for r in d.refusals]
        if left:
            raise ExportError(f"{checkpoint.name}: a layer's attention has no form on {config.target}: {left[0]}")
        models = {}
        for phase in PHASES:
            models[phase], done = pipeline.run(common, (*target.phases[phase], *target.precisions[config.precision]))
            report += _report(phase, done)
    except PassError as error:
        raise ExportError(f"{checkpoint.name}: {error}") from error
    return models, report


def _open(source: str | Path | torch.nn.Module, config: ExportConfig) -> Checkpoint:
    if isinstance(source, torch.nn.Module):
        return open_module(source, tokenizer=config.tokenizer)
    return open_checkpoint(
        source,
        attn_implementation=IMPLEMENTATION,
        experts_implementation=IMPLEMENTATION,
        tokenizer=config.tokenizer,
    )


def _layers(checkpoint: Checkpoint) -> int | None:
    layers = getattr(getattr(checkpoint.module, "config", None), "num_hidden_layers", None)
    return int(layers) if isinstance(layers, int) and checkpoint.kind != "module" else None


def _parameters(checkpoint: Checkpoint) -> int:
    return sum(w.size for w in {id(w): w for w in checkpoint.weights.values()}.values())


def _report(graph: str, done: Sequence[Done]) -> list[dict[str, Any]]:
    return [
        {
            "graph": graph,
            "pass": d.name,
            "count": d.count,
            "refusals": [{"node": r.node, "reason": r.reason} for r in d.refusals],
        }
        for d in done
    ]  # fmt: skip


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    config: ExportConfig,
    models: Mapping[str, ir.Model],
    report: list[dict[str, Any]],
    stages: Stages,
) -> Manifest:
    places = lay_out(models.values())
    try:
        with stages.bytes(sum(p.weight.nbytes for p in places.values())) as advance:
            files: dict[str, FileRecord] = {WEIGHTS_NAME: write_weights(folder, places, advance)}
    except PassError as error:
        raise ExportError(f"{checkpoint.name}: {error}") from error
    for phase, model in models.items():
        write_graph(folder, f"{phase}.onnx", model, places)
    cache = _cache(models["prefill"])
    tokenizer = _tokenizer(checkpoint)
    extra = dict(checkpoint.companions)
    if checkpoint.tokenizer is not None and tokenizer is not None:
        extra[tokenizer.file] = checkpoint.tokenizer.file
    architecture = getattr(checkpoint.module, "config", None)
    genai = genai_config(
        checkpoint,
        cache,
        getattr(architecture, "num_attention_heads", None),
        getattr(architecture, "hidden_size", None),
        config.context(checkpoint.max_context),
    )
    write_companions(folder, extra)
    if genai is not None:
        write_json(folder / "genai_config.json", genai)
    for path in sorted(folder.iterdir()):
        if path.name not in files:
            files[path.name] = record(path)
    manifest = Manifest(
        producer={name: importlib.metadata.version(name) for name in PACKAGES},
        source=Source(checkpoint.kind, checkpoint.name, checkpoint.model_type),
        target=config.target,
        precision=config.precision,
        model=ModelFacts(
            _parameters(checkpoint), checkpoint.vocab_size, config.context(checkpoint.max_context),
            checkpoint.bos_token_id, checkpoint.eos_token_ids, checkpoint.pad_token_id,
        ),
        kv_cache=cache,
        graphs=Graphs(**{phase: _graph_spec(phase, model, config) for phase, model in models.items()}),
        tokenizer=tokenizer,
        passes=tuple(report),
        files=files,
    )  # fmt: skip
    write_json(folder / MANIFEST_NAME, manifest.to_json())
    return manifest


def _graph_spec(phase: str, model: ir.Model, config: ExportConfig) -> GraphSpec:
    return GraphSpec(
        f"{phase}.onnx",
        dict(TARGETS[config.target].session),
        tensor_specs(model.graph.inputs),
        tensor_specs(model.graph.outputs),
    )


def _cache(model: ir.Model) -> CacheSpec:
    by_name = {spec.name: spec for spec in tensor_specs(model.graph.inputs)}
    layers = []
    for index in range(sum(name.endswith(".key") for name in by_name)):
        past, present = signature.past_names(index), signature.present_names(index)
        (_, kv_heads, _, key_dim), (_, _, _, value_dim) = by_name[past[0]].shape, by_name[past[1]].shape
        layers.append(CacheLayer(int(kv_heads), int(key_dim), int(value_dim), *past, *present))
    return CacheSpec("shared", "float32", tuple(layers))


def _tokenizer(checkpoint: Checkpoint) -> TokenizerSpec | None:
    files = checkpoint.tokenizer
    if files is None:
        return None
    name = "tokenizer.json" if files.kind == "tokenizer.json" else "tokenizer.model"
    return TokenizerSpec(
        files.kind, name, files.add_bos, tuple(CorpusEntry(text, tuple(ids)) for text, ids in files.corpus)
    )


def _self_check(folder: Path) -> None:
    """Run the bundle in a process of its own, as the runner will: without torch, and without its memory counting as the
    export's.
    """
    command = [sys.executable, "-m", "satchel.runtime.selftest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ExportError(
            f"the exported bundle does not run: {lines[-1] if lines else 'no message'}; "
            "nothing was written: report this model to satchel"
        )
