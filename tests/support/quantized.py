"""Tiny checkpoints that are quantized already, by each format's published rule, beside their widened weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from support.checkpoints import tiny_model
from transformers.pytorch_utils import Conv1D

Tensors = dict[str, torch.Tensor]
Writer = Callable[[str, NDArray[np.float32]], tuple[Tensors, NDArray[np.float32]]]
"""From a layer's name and weight [outputs, inputs]: its tensors by suffix, and the weight that they stand for."""


def save_quantized(folder: Path, settings: Mapping[str, Any], write: Writer, model: Any = None) -> torch.nn.Module:
    """Save a model, a tiny one by default, with its linear layers but the head in a format; return it with the widened
    weights."""
    model = tiny_model("llama") if model is None else model
    model.save_pretrained(folder)
    tensors: Tensors = {}
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and n != "lm_head"}
    turned = {n for n, m in model.named_modules() if isinstance(m, Conv1D)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer = name.removesuffix(".weight")
            if layer not in linear:
                tensors[name] = parameter.clone()
                continue
            made, widened = write(layer, (parameter.T if layer in turned else parameter).numpy())
            widened = widened.T if layer in turned else widened
            tensors |= {f"{layer}.{suffix}": tensor.clone().contiguous() for suffix, tensor in made.items()}
            parameter.copy_(torch.from_numpy(widened))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(settings)}))
    return model


def save_experts(folder: Path, settings: Mapping[str, Any], write: Writer) -> torch.nn.Module:
    """Save a tiny mixture with its experts in a format, each by itself; return it with the widened weights."""
    tiny_model("mixtral").save_pretrained(folder)
    tensors: Tensors = {}
    wide: Tensors = load_file(folder / "model.safetensors")
    for name, tensor in wide.items():
        layer = name.removesuffix(".weight")
        if ".experts." not in name:
            tensors[name] = tensor
            continue
        made, widened = write(layer, tensor.numpy())
        tensors |= {f"{layer}.{suffix}": part.clone().contiguous() for suffix, part in made.items()}
        wide[name] = torch.from_numpy(widened)
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": dict(settings)}))
    return model.train(False)


def logits(model: torch.nn.Module, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """The model's logits for ids [sequence], [sequence, vocabulary]."""
    with torch.no_grad():
        found: NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return found


def grid(
    weight: NDArray[np.float32], bits: int, size: int, *, symmetric: bool, group_of: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float16], NDArray[np.int64], NDArray[np.float32]]:
    """Unsigned values [outputs, inputs], scales and zero points [outputs, groups], and the widened weight."""
    outputs, inputs = weight.shape
    group_of = np.arange(inputs) // (inputs if size == -1 else size) if group_of is None else group_of
    groups, top = int(group_of.max()) + 1, 2**bits - 1
    scales, zeros = np.zeros((outputs, groups), np.float16), np.zeros((outputs, groups), np.int64)
    for g in range(groups):
        part = weight[:, group_of == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if symmetric:
            high, low = np.maximum(high, -low), -np.maximum(high, -low)
        scales[:, g] = ((high - low) / top).astype(np.float16)
        zeros[:, g] = 2 ** (bits - 1) if symmetric else np.clip(np.rint(-low / scales[:, g].astype(np.float32)), 1, top)
    wide = scales.astype(np.float32)
    codes = np.clip(np.rint(weight / wide[:, group_of]) + zeros[:, group_of], 0, top).astype(np.int64)
    widened = ((codes - zeros[:, group_of]) * wide[:, group_of]).astype(np.float32)
    return codes, scales, zeros, widened


def words(values: NDArray[np.int64], bits: int, axis: int) -> torch.Tensor:
    """Values along an axis, packed into int32 from the lowest bits on."""
    moved = np.moveaxis(values, axis, -1)
    each = 32 // bits
    total = np.zeros((*moved.shape[:-1], moved.shape[-1] // each), np.uint64)
    for place in range(each):
        total |= moved[..., place::each].astype(np.uint64) << np.uint64(bits * place)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(total.astype(np.uint32).view(np.int32), -1, axis)))


def gptq(bits: int, size: int, *, symmetric: bool = True, version: int = 1, act_order: bool = False) -> Writer:
    """GPTQ as AutoGPTQ (version 1, zero points minus 1) and GPTQModel (version 2) write it."""

    def write(name: str, weight: NDArray[np.float32]) -> tuple[Tensors, NDArray[np.float32]]:
        inputs = weight.shape[1]
        group_of = np.arange(inputs) // (inputs if size == -1 else size)
        if act_order:  # layers over one input have one order
            group_of = np.random.default_rng(inputs + name.count("mlp")).permutation(group_of)
        codes, scales, zeros, widened = grid(weight, bits, size, symmetric=symmetric, group_of=group_of)
        stored = zeros - 1 if version == 1 else zeros
        return {
            "qweight": words(codes.T, bits, 0),
            "qzeros": words(stored.T, bits, 1),
            "scales": torch.from_numpy(scales.T.copy()),
            "g_idx": torch.from_numpy(group_of.astype(np.int32)),
        }, widened

    return write


def awq(bits: int, size: int) -> Writer:
    """AWQ as AutoAWQ's GEMM layout: outputs of a word in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    order = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}[bits]

    def interleaved(values: NDArray[np.int64]) -> NDArray[np.int64]:
        return values.reshape(len(values), -1, len(order))[:, :, order].reshape(len(values), -1)

    def write(name: str, weight: NDArray[np.float32]) -> tuple[Tensors, NDArray[np.float32]]:
        codes, scales, zeros, widened = grid(weight, bits, size, symmetric=False)
        return {
            "qweight": words(interleaved(codes.T), bits, 1),
            "qzeros": words(interleaved(zeros.T), bits, 1),
            "scales": torch.from_numpy(scales.T.copy()),
        }, widened

    return write
