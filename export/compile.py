"""The story of an export: open, trace, run the passes, round, write, check, measure, publish."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from satchel.export.ahead import helper, in_thread
from satchel.export.checkpoint import Checkpoint, open_checkpoint, open_module
from satchel.export.checkpoint.adapters import with_adapters
from satchel.export.checkpoint.companions import generation_complaints
from satchel.export.checkpoint.families import PASSED
from satchel.export.checkpoint.separate_adapters import keep_apart
from satchel.export.checkpoint.tokenizer import notes_on
from satchel.export.config import STORED, ExportConfig
from satchel.export.errors import ExportError
from satchel.export.forecast import check_disk, forecast
from satchel.export.quantize.budget import budget_of, check_budget, find_recipe, with_recipe
from satchel.export.quantize.flow import fresh
from satchel.export.quantize.keeping import kept_recipe, resolve, stored_grids, to_round
from satchel.export.quantize.overflow import find_too_large, overflow_warnings
from satchel.export.quantize.quantize import pieces, quantize
from satchel.export.quantize.sensitivity import count
from satchel.export.quantize.texts import open_texts
from satchel.export.recipes import recipe_of
from satchel.export.recipes.fit import fit_recipe
from satchel.export.stages import STAGES, Stages
from satchel.export.threads import fixed_threads
from satchel.export.tracing.bind import bind
from satchel.export.tracing.own_attention import has_distance_bias
from satchel.export.tracing.rotary_tables import border_within, varies
from satchel.export.tracing.soundness import check_sound
from satchel.export.tracing.stand_ins import IMPLEMENTATION, register_implementations
from satchel.export.tracing.trace import trace
from satchel.export.user_passes import open_passes
from satchel.export.writing.bundle_writer import write_bundle
from satchel.export.writing.certify import WORKER, certified, open_bundle, reference_ahead
from satchel.export.writing.checked_graphs import check_attached, check_logits
from satchel.export.writing.provenance import source_records
from satchel.export.writing.publish import check_target, staged
from satchel.export.writing.resume import ROUNDING, check_resumes, scratch
from satchel.export.writing.self_check import SELFTEST, self_check
from satchel.export.writing.static_graphs import lower_static
from satchel.graphs.analysis.float32_islands import too_large
from satchel.graphs.ir import pipeline
from satchel.graphs.ir.contract import PassError
from satchel.graphs.ir.inputs import cached_layers
from satchel.graphs.ir.pipeline import Done, Step
from satchel.graphs.ir.values import INTERNAL, dims, nodes
from satchel.graphs.quant.assign import assign
from satchel.graphs.quant.quantized import Quantized
from satchel.graphs.quant.recipe import Recipe
from satchel.graphs.quant.stored import StoredGrid, orders_of
from satchel.graphs.targets.caches import ABSORB, with_caches
from satchel.graphs.targets.steps import FIT_FLOAT16, order_steps, output_step
from satchel.graphs.targets.targets import PLAIN, TARGETS
from satchel.runtime.bundle.contract import EMBED, PHASES, past_names
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.generation.generation_config import FILE
from satchel.runtime.ort.session import check_loads

INTERNAL_OPERATORS = {
    "Attention": "a layer's attention has",
    "Convolution": "its convolutions with state have",
    "Recurrence": "its linear recurrences have",
    "Experts": "its mixtures of experts have",
}
"""What each of the internal operators is called, if no pass of a target lowers it."""


def export_bundle(source: str | Path | torch.nn.Module, config: ExportConfig, *, progress: bool = False) -> Manifest:
    """Compile a checkpoint into a bundle at `config.output`.

    Args:
        source: A Hugging Face folder, a GGUF file, `file.py:factory`, or a module that follows the protocol.
        config: Where to and how.
        progress: Print the forecast, the stages and the result to standard error.

    Returns:
        The bundle's manifest.

    Raises:
        ExportError: The checkpoint or an option cannot be used, or a pass of the user's own failed; nothing is left
            behind.
        BundleError: A library of operators cannot be loaded.
    """
    with fixed_threads():
        return _export(source, config, progress)


def _export(source: str | Path | torch.nn.Module, config: ExportConfig, progress: bool) -> Manifest:
    config = dataclasses.replace(config, passes=open_passes(config.passes))
    check_loads(config.custom_ops)
    recipe = recipe_of(config)
    stages = Stages(progress, tuple(name for name in STAGES if name not in _skipped(config, recipe)))
    if not config.append_precision:
        check_target(config.output, config.force)
    with stages.stage("opening the checkpoint"):
        checkpoint = open_source(source, config)
    config, notes = resolve(config, checkpoint)
    if config.append_precision:
        config = dataclasses.replace(config, output=config.named_output, append_precision=False)
        check_target(config.output, config.force)
        stages.say(f"writing to {config.output} (-o names another folder)")
    grids = stored_grids(checkpoint)
    recipe = kept_recipe(recipe_of(config), config, grids, to_round(checkpoint))
    if recipe is not None:
        recipe = fit_recipe(recipe, checkpoint)
    budget = budget_of(config, checkpoint.parameters)
    if budget is not None and recipe is not None:
        check_budget(budget, recipe, checkpoint)
    with _named_errors(checkpoint.name, config.output):
        texts = open_texts(checkpoint, config, recipe)
    left = check_resumes(checkpoint, config)
    if config.resume:
        stages.say("starting anew: no export to resume" if left is None else "resuming the export that was interrupted")
    _announce(checkpoint, config, recipe, stages, notes)
    # Threads are fixed once more: the code of a module of the user's own, which has run by now, may have set others.
    kept, ahead = scratch(checkpoint, config, left, stages.say), contextlib.ExitStack()
    with _named_errors(checkpoint.name, config.output), fixed_threads(), kept as folder, ahead:
        sources = ahead.enter_context(in_thread("sources", lambda go_on: source_records(checkpoint, go_on)))
        selftest = ahead.enter_context(helper(SELFTEST))
        worker = ahead.enter_context(helper(WORKER)) if texts.certificate is not None else None
        with stages.stage("tracing the model"):
            model = trace_source(checkpoint, config)
        with stages.stage("optimizing the graphs"):
            common, report = lower(model, checkpoint, config, recipe, grids)
        if note := latent_note(common, report):
            stages.say(note)
        if budget is not None and recipe is not None and texts.calibration is not None:
            with stages.stage("measuring the layers"), stages.steps(count(common), "measuring") as bar:
                recipe, text = find_recipe(
                    common, recipe, budget, texts.calibration, folder / ROUNDING, bar, checkpoint.name
                )
            checkpoint = with_recipe(checkpoint, text)
            common, report = lower(model, checkpoint, config, recipe, grids)
        measured = folder / "certificate"
        reference = ahead.enter_context(reference_ahead(common, texts.certificate, measured))
        quantized = None
        if recipe is not None:
            with stages.stage("rounding the weights"), stages.steps(pieces(common, recipe, config), "rounding") as bar:
                quantized, done = quantize(common, recipe, texts.calibration, folder / ROUNDING, config, bar, grids)
                report += [step.as_json("common") for step in done]
        shared = common if quantized is None else quantized.model
        if texts.rounding is not None:
            shared = fit_float16(shared, texts.rounding, fresh(folder, "float16"), checkpoint.name, stages)
        lowered = lower_static if config.static else lower_phases
        models = lowered(shared, checkpoint, config, quantized, report)
        check_logits(models, checkpoint)
        check_attached(models, checkpoint)
        with staged(config.output, config.force) as bundle:
            with stages.stage("writing the bundle"):
                manifest = write_bundle(
                    bundle, checkpoint, config, models, quantized, report, sources.result, stages.bytes
                )
            if worker is not None:
                open_bundle(bundle, texts, measured, worker, config.custom_ops)
            with stages.stage("checking the bundle"):
                self_check(bundle, config, selftest)
            if worker is not None and reference is not None:
                with stages.stage("measuring the bundle"):
                    manifest = certified(bundle, measured, reference, worker)
    return manifest


def open_source(source: str | Path | torch.nn.Module, config: ExportConfig) -> Checkpoint:
    """Open a checkpoint in the form that can be traced.

    Raises:
        ExportError: It cannot be opened.
    """
    register_implementations()
    merged = () if config.separate_adapters else config.adapters
    if isinstance(source, torch.nn.Module):
        checkpoint = with_adapters(open_module(source, tokenizer=config.tokenizer), merged)
    else:
        checkpoint = open_checkpoint(
            source, attn_implementation=IMPLEMENTATION, experts_implementation=IMPLEMENTATION,
            tokenizer=config.tokenizer, adapters=merged, layout=config.layout, weights=config.weights,
        )  # fmt: skip
    return keep_apart(checkpoint, config.adapters) if config.separate_adapters else checkpoint


def trace_source(checkpoint: Checkpoint, config: ExportConfig) -> ir.Model:
    """The checkpoint's graph as the tracer writes it, its weights bound to the checkpoint.

    Raises:
        ExportError: The model cannot be traced, or its KV cache cannot be int8.
    """
    if config.int8_cache and has_distance_bias(checkpoint.module):
        raise ExportError(
            f"--kv-cache int8: keys of a {checkpoint.model_type} model have a bias for distance (ALiBi), which grows "
            "with the position and does not fit 8 bits: choose float"
        )
    context = config.context(checkpoint.max_context)
    hidden = config.embeddings is not None
    traced = trace(checkpoint.module, checkpoint.name, context, checkpoint.kind == "module", hidden=hidden)
    return bind(traced, checkpoint.weights, checkpoint.name)


def lower(
    model: ir.Model,
    checkpoint: Checkpoint,
    config: ExportConfig,
    recipe: Recipe | None = None,
    grids: Mapping[str, StoredGrid] | None = None,
) -> tuple[ir.Model, list[dict[str, Any]]]:
    """Run the passes over the traced graph that all phases share.

    Returns:
        The graph, its weights marked with the rules of `recipe`; and what every pass did, for the manifest.

    Raises:
        ExportError: The model is no decoder that a KV cache can serve, or a layer has no form on the target.
        PassError: A pass left a graph broken.
    """
    target = TARGETS[config.target]
    normal, normalized = pipeline.run(model, target.normalize)
    check_sound(normal, checkpoint.name, checkpoint.layers, checkpoint.layer_types)
    orders = {} if grids is None or config.precision != STORED else orders_of(grids)
    marks = () if recipe is None else (Step(assign(recipe)), *order_steps(orders))
    fuse = with_caches(target.fuse, config.latent_cache, shared=not config.int8_cache)
    common, fused = pipeline.run(normal, (*marks, *fuse))
    _check_latent(fused, checkpoint.name, config)
    for kind, called in INTERNAL_OPERATORS.items():
        left = {str(node.name) for node in nodes(common, kind, INTERNAL)}
        reasons = [refusal.reason for done in fused for refusal in done.refusals if refusal.node in left]
        if left:
            why = f": {reasons[-1]}" if reasons else ": choose --target cpu"
            raise ExportError(f"{checkpoint.name}: {called} no form on --target {config.target}{why}")
    return common, [done.as_json("common") for done in (*normalized, *fused)]


def _check_latent(fused: Sequence[Done], name: str, config: ExportConfig) -> None:
    """Check that every layer keeps latents where that is asked for.

    Raises:
        ExportError: One cannot, or the model has no latent attention.
    """
    done = next((each for each in fused if each.name == ABSORB), None)
    if config.latent_cache == "compressed" and (done is None or done.refusals or not done.count):
        reasons = [refusal.reason for refusal in done.refusals] if done is not None else []
        raise ExportError(
            f"{name}: --latent-cache compressed: {reasons[0] if reasons else 'it has no latent attention'}: leave it "
            "out, or choose expanded"
        )


def latent_note(common: ir.Model, report: Sequence[Mapping[str, Any]]) -> str | None:
    """What to say about the latents that layers keep in place of keys and values, if any do."""
    count = next((step["count"] for step in report if step["pass"] == ABSORB), 0)
    if not count:
        return None
    names = {str(value.name): dims(value) for value in common.graph.inputs}
    alone = [i for i in cached_layers(common) if past_names(i)[1] not in names]
    widths = {(names[past_names(i)[0]] or [0])[-1] for i in alone}
    numbers = " or ".join(map(str, sorted(widths, key=str)))
    return (
        f"latent attention: {count} layers keep {numbers} numbers of each token in place of the keys and values of all "
        "heads; --latent-cache expanded keeps those"
    )


def fit_float16(common: ir.Model, windows: NDArray[np.int64], folder: Path, name: str, stages: Stages) -> ir.Model:
    """The graph that all phases share, for a target that computes in float16: values that it does not hold are scaled
    down, or marked to stay in float32. Each is named in a warning.

    Raises:
        PassError: The pass left the graph broken.
    """
    find_too_large(common, windows, folder)
    scaled, _ = pipeline.run(common, FIT_FLOAT16)
    for warning in overflow_warnings(too_large(common), too_large(scaled)):
        stages.say(f"warning: {name}: {warning}")
    return scaled


def lower_phases(
    common: ir.Model,
    checkpoint: Checkpoint,
    config: ExportConfig,
    quantized: Quantized | None,
    report: list[dict[str, Any]],
) -> dict[str, ir.Model]:
    """The graph of each phase; what the passes did is added to `report`.

    Raises:
        ExportError: A layer cannot be quantized as asked for.
        PassError: A pass left a graph broken.
    """
    target, models = TARGETS[config.target], {}
    custom = tuple(Step(user.graph_pass) for user in config.passes)
    names = {step.name for step in custom}
    hidden = config.embeddings is not None
    for phase in (*target.graphs(config.precision, quantized), *((EMBED,) if hidden else ())):
        steps = target.steps(phase, config.precision, quantized, custom)
        models[phase], finished = pipeline.run(common, (output_step(phase), *steps) if hidden else steps)
        report += [done.as_json(phase) for done in finished]
        ours = [done for done in finished if done.name not in names]
        refused = [r for done in ours if done.name.startswith("quantize_") for r in done.refusals]
        if refused:
            raise ExportError(
                f"{checkpoint.name}: {refused[0].node} cannot be quantized: {refused[0].reason}; "
                "leave the layer in float by a --recipe of your own, or a cache by --kv-cache float"
            )
    for phase in PHASES if custom else ():  # what runs where the user's passes are switched off
        models[f"{PLAIN}{phase}"], _ = pipeline.run(common, target.steps(phase, config.precision, quantized))
    return models


def _skipped(config: ExportConfig, recipe: Recipe | None) -> set[str]:
    """The stages that an export does not have."""
    skipped = set() if config.certificate else {"measuring the bundle"}
    skipped |= set() if config.budgeted else {"measuring the layers"}
    return skipped if recipe is not None else {"rounding the weights", *skipped}


def _announce(
    checkpoint: Checkpoint, config: ExportConfig, recipe: Recipe | None, stages: Stages, notes: Sequence[str]
) -> None:
    """Print what the export needs and what the user should know before it starts, and check the disk space."""
    needed = forecast(checkpoint, config, recipe)
    context = config.context(checkpoint.max_context)
    stages.say(
        f"{checkpoint.name}: {checkpoint.parameters / 1e6:,.1f} M parameters, context {context:,}; needs {needed}"
    )
    for note in notes:
        stages.say(note)
    if checkpoint.kind != "module" and checkpoint.model_type not in PASSED:
        stages.say(
            f"{checkpoint.name}: model_type {checkpoint.model_type} is not among the families that satchel is tested "
            "on: compare the bundle's answers with the original's"
        )
    for note in checkpoint.notes:
        stages.say(f"warning: {checkpoint.name}: {note}")
    if checkpoint.tokenizer is None:
        stages.say(
            f"warning: {checkpoint.name} has no tokenizer: the bundle will take and give token ids only, and is "
            "measured on random ids; name one with --tokenizer"
        )
    else:
        for note in notes_on(checkpoint.tokenizer, checkpoint.vocab_size):
            stages.say(f"warning: {checkpoint.name}: {note}")
    border = None if checkpoint.kind == "module" else border_within(checkpoint.module, context)
    if border is not None and varies(checkpoint.module):
        stages.say(
            f"warning: {checkpoint.name}: its rotary embeddings change with each token beyond {border:,} (dynamic "
            f"scaling); texts of up to {border:,} tokens have their own in the bundle, all longer ones those of "
            f"{context:,} tokens: --max-context {border} leaves those out"
        )
    for complaint in generation_complaints(checkpoint.companions, checkpoint.vocab_size):
        stages.say(f"warning: {checkpoint.name}: {FILE}: {complaint}")
    check_disk(needed, config.output)
    stages.expect(needed.stages)


@contextlib.contextmanager
def _named_errors(name: str, output: Path) -> Iterator[None]:
    """Turn what passes and the disk have to say into an error that names the checkpoint."""
    try:
        yield
    except PassError as error:
        raise ExportError(f"{name}: {error}") from error
    except OSError as error:
        place = error.filename or output
        raise ExportError(
            f"{name}: {place} cannot be written ({error.strerror}): free space or choose another"
        ) from error
