"""Opens a checkpoint in any supported format."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from satchel.export.checkpoint.adapters import with_adapters
from satchel.export.checkpoint.gguf import open_gguf
from satchel.export.checkpoint.huggingface import open_huggingface
from satchel.export.checkpoint.module import load_module, open_module
from satchel.export.checkpoint.record import Checkpoint
from satchel.export.checkpoint.structure import Implementations
from satchel.export.errors import ExportError
from satchel.runtime.bundle.recognize import is_locked, is_made_by_satchel

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_TORCH_FILES = (".pt", ".pth", ".bin", ".safetensors")
_FACTORY = re.compile(r"(?P<file>.+\.py):(?P<factory>\w+)")


def open_checkpoint(
    source: str | Path,
    *,
    attn_implementation: str = "eager",
    experts_implementation: str | None = None,
    tokenizer: Path | None = None,
    adapters: Sequence[str | Path] = (),
    layout: str | None = None,
    weights: Path | None = None,
) -> Checkpoint:
    """Open a checkpoint: its config and structure at once, the values of weights on demand.

    Args:
        source: A Hugging Face folder, a `.gguf` file, or `file.py:factory` for a custom module.
        attn_implementation: Name of the attention function in transformers' registry.
        experts_implementation: The same for mixture-of-experts layers; None for transformers' default.
        tokenizer: A tokenizer.json, a SentencePiece `.model` or a folder to use instead of the source's own.
        adapters: Folders of LoRA adapters to merge, each a path or FOLDER=SHARE.
        layout: The model_type to read a folder as, where transformers does not know its own.
        weights: A file of tensors for the module of `file.py:factory`.

    Raises:
        ExportError: The source is missing, damaged, a bundle, or not a causal language model in floating point.
    """
    implementations = Implementations(attn_implementation, experts_implementation)
    factory = _FACTORY.fullmatch(str(source))
    if factory is not None:
        if layout is not None:
            raise ExportError(f"--as {layout} does not go with file.py:factory, whose module says how it is built")
        module = load_module(Path(factory["file"]), factory["factory"])
        checkpoint = open_module(module, name=Path(factory["file"]).name, tokenizer=tokenizer, weights=weights)
        files = (Path(factory["file"]), *([] if weights is None else [weights]))
        return with_adapters(dataclasses.replace(checkpoint, sources=files), adapters)
    if weights is not None:
        raise ExportError(f"--weights {weights} goes with file.py:factory only; a folder or GGUF has its own weights")
    path = Path(source)
    if is_locked(path):
        raise ExportError(f"{path}: permission denied: check the file's permissions")
    if is_made_by_satchel(path):
        raise ExportError(
            f"{path}: is already a bundle: use it with satchel run or satchel chat, or pass the checkpoint "
            "that it was exported from"
        )
    if path.suffix == ".py":
        raise ExportError(f"{path}: also name the function that builds the module: {path}:FUNCTION")
    if path.is_dir():
        return with_adapters(open_huggingface(path, implementations, tokenizer, layout), adapters)
    if path.suffix in _TORCH_FILES and path.is_file():
        raise ExportError(
            f"{path}: holds tensors and not the code of their model: export satchel export FILE.py:FUNCTION "
            f"--weights {path}, or the whole folder if save_pretrained wrote it"
        )
    if path.is_file():
        if layout is not None:
            raise ExportError(f"--as {layout} does not go with a GGUF file, which names its architecture")
        return with_adapters(open_gguf(path, implementations, tokenizer), adapters)
    raise ExportError(_missing(str(source)))


def _missing(source: str) -> str:
    if _HUB_NAME.fullmatch(source):
        return (
            f"{source}: no such folder; satchel exports from local files: download it first "
            f"(e.g. `hf download {source} --local-dir DIR`) and pass DIR"
        )
    return f"{source}: no such file or folder; pass a checkpoint folder, a .gguf file or file.py:factory"
