"""Maps the tensors of a GGUF file to the module's parameters, and undoes the changes of the conversion to GGUF."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

from satchel.export.checkpoint.gguf_architectures import Architecture
from satchel.export.checkpoint.gguf_file import GgufFile
from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight, concatenated, mapped

_ROPE_FACTORS = "rope_freqs.weight"
_GATE_UP = ".mlp.experts.gate_up_proj"
_STACKED = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")


def gguf_weights(module: PreTrainedModel, file: GgufFile, architecture: Architecture) -> dict[str, LazyWeight]:
    """Return the module's weights from the file's tensors; tied weights are left to `tie`.

    If the file stores rotary factors as a tensor, the module's frequency buffers are scaled in place.

    Raises:
        ExportError: If the file contains a tensor that the module does not use.
    """
    layers = module.config.num_hidden_layers
    kind = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[file.metadata["general.architecture"]]
    names = gguf.get_tensor_name_map(kind, layers)
    placed: set[str] = set()
    weights: dict[str, LazyWeight] = {}
    for name, parameter in module.state_dict().items():
        sources = _stored_names(name, names)
        if not all(source in file.tensors for source in sources):
            continue
        placed.update(sources)
        tensors = [file.tensors[source] for source in sources]
        weight = tensors[0] if len(tensors) == 1 else concatenated(tensors, 1, name)
        weights[name] = _restored(name, weight, architecture, module, tuple(parameter.shape))
    if _ROPE_FACTORS in file.tensors:
        _scale_frequencies(module, file)
        placed.add(_ROPE_FACTORS)
    left = sorted(file.tensors.keys() - placed)
    if left:
        raise ExportError(
            f"{file.path}: tensor {left[0]} is not part of a {architecture.model_type} model as satchel reads it; "
            "export from the original float checkpoint"
        )
    return weights


def permuted_rows(weight: LazyWeight, heads: int) -> LazyWeight:
    """Permute rows from interleaved rotary pairs (0, half, 1, half + 1, ...) back to halves, per head.

    This undoes the permutation that llama.cpp's conversion applies to the query and key projections of Llama models.
    """
    head_dim = weight.row_count // heads

    def restore(values: np.ndarray) -> np.ndarray:
        pairs = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])  # [heads, pair, half, ...]
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def rows(start: int, stop: int) -> np.ndarray:
        low, high = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
        return restore(weight.rows(low, high))[start - low : stop - low]

    columns = (lambda a, b: restore(weight.columns(a, b))) if len(weight.dims) > 1 else None
    return LazyWeight(weight.name, weight.dims, weight.dtype, rows, columns)


def _stored_names(name: str, names: gguf.TensorNameMap) -> list[str]:
    """Return the tensors that a parameter consists of; an unknown parameter maps to a name that is in no file."""
    if name.endswith(_GATE_UP):
        layer = name.removesuffix(_GATE_UP).rpartition(".")[2]
        return [f"blk.{layer}.ffn_gate_exps.weight", f"blk.{layer}.ffn_up_exps.weight"]
    if name.endswith(_STACKED):
        return [f"{names.get_name(name)}.weight"]
    stem, _, suffix = name.rpartition(".")
    # The name map of Gemma 2 has no head, which is tied, but a file may store one anyway.
    stored = "output" if stem == "lm_head" else names.get_name(stem)
    return [f"{stored}.{suffix}"]


def _restored(
    name: str, weight: LazyWeight, architecture: Architecture, module: PreTrainedModel, shape: tuple[int, ...]
) -> LazyWeight:
    config = module.config
    if architecture.permuted and ".self_attn.q_proj." in name:
        return permuted_rows(weight, config.num_attention_heads)
    if architecture.permuted and ".self_attn.k_proj." in name:
        return permuted_rows(weight, config.num_key_value_heads)
    if architecture.norm_offset and name.endswith("norm.weight"):
        offset = np.float32(architecture.norm_offset)
        return mapped(weight, lambda values: values - offset, weight.name)
    if len(shape) == 2 and shape[0] == 1 and len(weight.dims) == 1:
        # The gate of the shared expert is stored as a vector.
        return LazyWeight(weight.name, (1, *weight.dims), weight.dtype, lambda a, b: weight.numpy()[None][a:b])
    return weight


def _scale_frequencies(module: PreTrainedModel, file: GgufFile) -> None:
    """Divide the rotary frequencies by the file's factors, the stored form of Llama 3's scaling."""
    factors = torch.from_numpy(np.array(file.tensors[_ROPE_FACTORS].numpy()))
    for name, buffer in module.named_buffers():
        if not name.endswith("inv_freq"):
            continue
        if buffer.shape != factors.shape:
            raise ExportError(
                f"{file.path}: {_ROPE_FACTORS} has {factors.numel()} factors for {buffer.numel()} frequencies; "
                "export from the original float checkpoint"
            )
        buffer.div_(factors)
