"""Completes the weights: tied names share one weight, and every name of the module has one of the right shape."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight


def tie(module: PreTrainedModel, weights: dict[str, LazyWeight]) -> list[str]:
    """Make names that the config ties share one weight, in place.

    If both are stored and differ, the checkpoint overrides the config: the module's parameters are untied, as in
    transformers' loader. Returns the names of these.
    """
    apart = []
    for target, origin in list(module.all_tied_weights_keys.items()):
        if target in weights and origin in weights:
            if _equal(weights[target], weights[origin]):
                weights[target] = weights[origin]
            else:
                _untie(module, target)
                apart.append(target)
        elif origin in weights:
            weights[target] = weights[origin]
        elif target in weights:
            weights[origin] = weights[target]
    return apart


def checked(module: torch.nn.Module, weights: dict[str, LazyWeight], source: str) -> dict[str, LazyWeight]:
    """Return the weights in the order of `module.state_dict()`.

    Raises:
        ExportError: If a weight is missing, is not floating point where the module is, or its shape differs.
    """
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in weights]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        kind = _kind(module, missing[0])
        part = f", a part of a layer that the config calls {kind}: use the config of these weights," if kind else ";"
        remedy = "download the checkpoint again, or export the whole one"
        if missing == ["lm_head.weight"]:
            remedy += '; for embeddings, which need no head, set "tie_word_embeddings": true in its config.json'
        raise ExportError(f"{source}: tensor {missing[0]} is missing{more}{part} {remedy}")
    for name, tensor in wanted.items():
        if tensor.is_floating_point() and weights[name].dtype != ir.DataType.FLOAT:
            raise ExportError(
                f"{source}: tensor {name} holds {weights[name].dtype.name}, so the weights are quantized in a "
                "way that the config does not describe; export from the original float checkpoint"
            )
        found, expected = weights[name].dims, tuple(tensor.shape)
        if found != expected:
            raise ExportError(
                f"{source}: tensor {name} has shape {list(found)}, but the config specifies {list(expected)}; "
                "use the config that belongs to these weights"
            )
    return {name: weights[name] for name in wanted}


def _kind(module: torch.nn.Module, name: str) -> str | None:
    """What the config calls the layer that a tensor is a part of, if its layers are of several kinds."""
    kinds = getattr(getattr(module, "config", None), "layer_types", None) or ()
    number = next((int(part) for part in name.split(".") if part.isdecimal()), len(kinds))
    return str(kinds[number]) if number < len(kinds) else None


def _equal(first: LazyWeight, second: LazyWeight) -> bool:
    if first is second:
        return True
    if first.dims != second.dims:
        return False
    return all(np.array_equal(a, b) for a, b in zip(first.blocks(), second.blocks(), strict=True))


def _untie(module: PreTrainedModel, name: str) -> None:
    path, _, attribute = name.rpartition(".")
    parent = module.get_submodule(path)
    tied = module.get_parameter(name)
    setattr(parent, attribute, torch.nn.Parameter(torch.empty_like(tied), requires_grad=tied.requires_grad))
    del module.all_tied_weights_keys[name]
    module.config.tie_word_embeddings = False
