"""The reference that a bundle is evaluated against: the checkpoint in float32, loaded and run by transformers.

It shares no code with the export, neither the weight loading nor the attention, so that errors of the export show. Only
a custom module shares the code that the export traces, with the attention implemented here.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from logging import ERROR
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.utils import logging

from satchel.export.checkpoint.module import load_module, open_module
from satchel.export.checkpoint.structure import one_line
from satchel.export.errors import ExportError
from satchel.runtime.evaluation.fidelity import Reference

_LOAD_ERRORS = (
    ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError, ImportError, IndexError, SafetensorError,
    StrictDataclassError,
)  # fmt: skip
"""What transformers raises for checkpoints that it cannot load; it has no common error class."""


def open_reference(source: str | Path) -> Reference:
    """Load a whole checkpoint, and return a function that computes its logits.

    The reference maps token ids [sequence] int64 to logits [sequence, vocabulary] float32, computed in float32 on the
    CPU without a cache. A Hugging Face folder or GGUF file runs as a transformers model with "eager" attention.

    Args:
        source: A Hugging Face folder, a GGUF file, or `file.py:factory` for a custom module.

    Raises:
        ExportError: The source is missing, cannot be loaded, or lacks some weights.
    """
    file, colon, factory = str(source).rpartition(":")
    if colon and file.endswith(".py"):
        return _module_reference(open_module(load_module(Path(file), factory)).module)
    path = Path(source)
    if path.is_dir():
        return _transformers_reference(path, {"pretrained_model_name_or_path": str(path)})
    if path.is_file():
        return _transformers_reference(
            path, {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        )
    raise ExportError(
        f"{source}: no such file or folder; pass a bundle, a checkpoint folder, a .gguf file or file.py:factory"
    )


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Causal grouped-query attention over a whole sequence, as the protocol for custom modules defines it.

    query [batch, heads, sequence, head_dim], key and value [batch, kv_heads, sequence, ...] ->
    [batch, heads, sequence, last dimension of value].
    """
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(query.shape[2])
    distance = position[:, None] - position
    seen = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value


def _transformers_reference(path: Path, place: dict[str, str]) -> Reference:
    local: dict[str, Any] = {**place, "local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(**local)
            multimodal = config.get_text_config() is not config
            load: Any = AutoModelForMultimodalLM if multimodal else AutoModelForCausalLM  # untyped in transformers
            # The eager attention of Falcon adds its bias for distance twice.
            attention = "sdpa" if config.model_type == "falcon" else "eager"
            model, report = load.from_pretrained(
                **local, config=config, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
            )
    except _LOAD_ERRORS as error:
        raise ExportError(f"{path}: transformers cannot load it as a reference: {one_line(error)}") from None
    # Missing weights stay random, so the reference would be noise.
    unset = sorted({str(name) for kind in ("missing_keys", "mismatched_keys") for name in report[kind]})
    if unset:
        raise ExportError(f"{path}: {unset[0]} is missing or has the wrong shape; use a complete checkpoint")
    model.eval()

    def run(ids: torch.Tensor) -> torch.Tensor:
        with _quiet():
            logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return logits

    return _reference(run)


def _module_reference(module: torch.nn.Module) -> Reference:
    def run(ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = module(ids, torch.arange(ids.shape[1])[None], plain_attention)
        return logits

    return _reference(run)


def _reference(run: Callable[[torch.Tensor], torch.Tensor]) -> Reference:
    def logits(ids: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.no_grad():
            found: NDArray[np.float32] = run(torch.from_numpy(ids.copy())[None])[0].float().numpy()
        return found

    return logits


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and its advice to install other kernels off the terminal.

    Its errors are exceptions.
    """
    level = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(level)
