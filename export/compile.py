"""The story of an export: open, trace, run the passes, write, check, publish."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from satchel.export.bind import bind
from satchel.export.bundle_writer import write_bundle
from satchel.export.checkpoint import Checkpoint, open_checkpoint, open_module
from satchel.export.config import ExportConfig
from satchel.export.errors import ExportError
from satchel.export.families import PASSED
from satchel.export.forecast import check_disk, forecast
from satchel.export.publish import check_target, staged
from satchel.export.soundness import check_sound
from satchel.export.stages import Stages
from satchel.export.stand_ins import IMPLEMENTATION, register_implementations
from satchel.export.trace import trace
from satchel.graphs import pipeline
from satchel.graphs.contract import PassError
from satchel.graphs.targets import PHASES, TARGETS
from satchel.runtime.manifest import Manifest


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
    context = config.context(checkpoint.max_context)
    needed = forecast(checkpoint, config.precision)
    stages.say(
        f"{checkpoint.name}: {checkpoint.parameters / 1e6:,.1f} M parameters, context {context:,}; needs {needed}"
    )
    if checkpoint.kind != "module" and checkpoint.model_type not in PASSED:
        stages.say(
            f"{checkpoint.name}: model_type {checkpoint.model_type} is not among the families that satchel is tested "
            "on: compare the bundle's answers with the original's"
        )
    check_disk(needed, config.output)
    with stages.stage("tracing the model"):
        traced = trace(checkpoint.module, checkpoint.name, context, protocol=checkpoint.kind == "module")
        model = bind(traced, checkpoint.weights, checkpoint.name)
    with stages.stage("optimising the graphs"), _named_errors(checkpoint.name, config.output):
        graphs = lower(model, checkpoint, config)
    with _named_errors(checkpoint.name, config.output), staged(config.output, config.force) as folder:
        with stages.stage("writing the weights"):
            manifest = write_bundle(folder, checkpoint, config, graphs.models, graphs.report, stages.bytes)
        with stages.stage("checking the bundle"):
            _self_check(folder)
    return manifest


@dataclasses.dataclass(frozen=True)
class Lowered:
    """The graph of each phase, and what every pass did, for the manifest."""

    models: Mapping[str, ir.Model]
    report: tuple[dict[str, Any], ...]


def lower(model: ir.Model, checkpoint: Checkpoint, config: ExportConfig) -> Lowered:
    """Run the target's passes over the traced graph.

    Raises:
        ExportError: The model is no decoder that a KV cache can serve, or a layer has no form on the target.
        PassError: A pass left a graph broken.
    """
    target = TARGETS[config.target]
    normal, normalised = pipeline.run(model, target.normalise)
    check_sound(normal, checkpoint.name, checkpoint.layers)
    common, fused = pipeline.run(normal, target.fuse)
    left = [refusal.reason for done in fused if done.name == "expand_attention" for refusal in done.refusals]
    if left:
        raise ExportError(f"{checkpoint.name}: a layer's attention has no form on {config.target}: {left[0]}")
    models, report = {}, [done.as_json("common") for done in (*normalised, *fused)]
    for phase in PHASES:
        steps = (*target.phases[phase], *target.precisions[config.precision])
        models[phase], finished = pipeline.run(common, steps)
        report += [done.as_json(phase) for done in finished]
    _check_logits(models, checkpoint)
    return Lowered(models, tuple(report))


def _check_logits(models: Mapping[str, ir.Model], checkpoint: Checkpoint) -> None:
    """Check that prefill and decode give the last token's logits alone, and one for each id."""
    name = checkpoint.name
    for phase in ("prefill", "decode"):
        shape = models[phase].graph.outputs[0].shape
        if shape is None or len(shape) != 3 or shape[1] != 1:
            raise ExportError(
                f"{name}: what makes its logits does not work on each token alone, which satchel does not support"
            )
        if shape[2] != checkpoint.vocab_size:
            raise ExportError(
                f"{name}: its logits are {shape[2]} wide, and vocab_size says {checkpoint.vocab_size}: "
                "give vocab_size as the last dimension of the logits"
            )


def _open(source: str | Path | torch.nn.Module, config: ExportConfig) -> Checkpoint:
    if isinstance(source, torch.nn.Module):
        return open_module(source, tokenizer=config.tokenizer)
    return open_checkpoint(
        source,
        attn_implementation=IMPLEMENTATION,
        experts_implementation=IMPLEMENTATION,
        tokenizer=config.tokenizer,
    )


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


def _self_check(folder: Path) -> None:
    """Run the bundle as a user will: in a process of its own, without torch."""
    command = [sys.executable, "-m", "satchel.runtime.selftest", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise ExportError(
            f"the exported bundle does not run: {lines[-1] if lines else 'no message'}; "
            "nothing was written: report this model to satchel"
        )
