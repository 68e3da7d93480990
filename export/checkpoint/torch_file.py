"""Reads PyTorch checkpoint files without running code that their pickle may contain."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch

from satchel.export.errors import ExportError
from satchel.graphs.ir.weights import LazyWeight, from_array

_ZIP_MAGIC = b"PK\x03\x04"
_NESTED = ("state_dict", "model_state_dict", "model")
"""Under which keys training loops store the tensors of the model, beside those of the optimizer."""


def read_torch(path: Path) -> dict[str, LazyWeight]:
    """Return the tensors of a `.bin` file, memory-mapped; floating point is converted to float32 after slicing.

    Raises:
        ExportError: If the file is damaged, in the format before PyTorch 1.6 (which cannot be mapped), or contains
            anything but tensors, such as a pickle that would run code.
    """
    with path.open("rb") as file:
        magic = file.read(len(_ZIP_MAGIC))
    if magic != _ZIP_MAGIC:
        raise ExportError(
            f"{path}: not a zip archive as written by torch.save since 1.6, so outdated or damaged; download it again "
            "or save the model with save_pretrained, which writes safetensors"
        )
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ExportError(
            f"{path}: holds Python objects besides tensors, which could run code; satchel reads tensors only: "
            "save the model with save_pretrained, which writes safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError):
        raise ExportError(f"{path}: cut short or damaged; download it again") from None
    for key in _NESTED:
        if isinstance(tensors, Mapping) and isinstance(tensors.get(key), Mapping):
            tensors = tensors[key]
            break
    if not isinstance(tensors, Mapping) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ExportError(f"{path}: not a dictionary of tensors; save the model's state_dict, or use save_pretrained")
    return {name: from_tensor(name, tensor) for name, tensor in tensors.items()}


def from_tensor(name: str, tensor: torch.Tensor) -> LazyWeight:
    """Return a weight over a torch tensor; floating point is read as float32, a few rows at a time."""
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return from_array(name, tensor.numpy())
    shaped = tensor.reshape(1) if tensor.ndim == 0 else tensor
    return LazyWeight(
        name, tuple(tensor.shape), ir.DataType.FLOAT,
        rows=lambda a, b: shaped[a:b].to(torch.float32).numpy(),
        columns=(lambda a, b: shaped[:, a:b].to(torch.float32).numpy()) if shaped.ndim > 1 else None,
    )  # fmt: skip
