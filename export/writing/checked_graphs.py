"""Checks of the graphs of a bundle before they are written."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from satchel.export.checkpoint import Checkpoint
from satchel.export.checkpoint.separate_adapters import changes_in
from satchel.export.errors import ExportError
from satchel.graphs.passes.adapt.attach_adapters import adapter_inputs
from satchel.graphs.targets.targets import PLAIN
from satchel.runtime.bundle.contract import LOGITS, lora_names


def check_logits(models: Mapping[str, ir.Model], checkpoint: Checkpoint) -> None:
    """Check that the graphs of prefill and decode give the last token's logits alone, and one for each id.

    Raises:
        ExportError: One does not.
    """
    name = checkpoint.name
    outputs = ((key.removeprefix(PLAIN), value) for key, model in models.items() for value in model.graph.outputs)
    for shape in (v.shape for key, v in outputs if v.name == LOGITS and not key.startswith("score")):
        if shape is None or len(shape) != 3 or shape[1] != 1:
            raise ExportError(
                f"{name}: what makes its logits does not work on each token alone, which satchel does not support"
            )
        if shape[2] != checkpoint.vocab_size:
            raise ExportError(
                f"{name}: its logits are {shape[2]} wide, and vocab_size says {checkpoint.vocab_size}: "
                "give vocab_size as the last dimension of the logits"
            )


def check_attached(models: Mapping[str, ir.Model], checkpoint: Checkpoint) -> None:
    """Check that every graph has inputs for all layers that adapters change.

    Raises:
        ExportError: One has not.
    """
    there = set[str].intersection(*(set(adapter_inputs(model)) for model in models.values()))
    for change in changes_in(checkpoint):
        if there.isdisjoint(lora_names(change.layer)):
            adapter, why = next(iter(change.adapters)), "is not multiplied as a linear layer of its own in this model"
            if change.gains:
                adapter, why = next(iter(change.gains)), "has DoRA's lengths of outputs, which are rotated here"
            raise ExportError(
                f"--adapter {adapter}: {change.layer} {why}, so that its change cannot be kept apart; merge it: "
                "without --adapters separate"
                + (", or choose a precision without rotations, such as fp32" if change.gains else "")
            )
