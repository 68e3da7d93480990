"""Opens a custom module as a checkpoint.

A module that follows this protocol is exported like any other model:

    class TinyModel(torch.nn.Module):
        satchel = ModuleFacts(vocab_size=256, max_context=512, eos_token_ids=(0,))

        def forward(self, input_ids, position_ids, attention):
            ...
            mixed = attention(query, key, value)   # once per layer, in the order of the layers
            ...
            return logits

- `satchel`, on the class or the instance, is a `ModuleFacts` with the facts that the weights do not show.
- `input_ids` and `position_ids` are int64 [batch, sequence]; `forward` returns logits, float32
  [batch, sequence, vocabulary].
- `attention(query, key, value, *, scale=None, window=None, softcap=None)` takes query [batch, heads, sequence,
  head_dim] and key and value [batch, kv_heads, sequence, head_dim] of the new tokens only, and returns [batch, heads,
  sequence, head_dim]. It is causal and manages the KV cache; the module never sees past tokens. `scale` multiplies the
  scores (1/sqrt(head_dim) if None), `window` is the sliding window in positions, including the token itself, and
  `softcap` limits the scores to `softcap * tanh(scores / softcap)`.
- `forward` applies the positions in `position_ids` itself, with a rotary or a learned embedding.
- The weights are those in `state_dict()`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

from satchel.export.checkpoint.prefixes import without_prefixes
from satchel.export.checkpoint.record import Checkpoint
from satchel.export.checkpoint.safetensors_file import read_safetensors
from satchel.export.checkpoint.structure import one_line
from satchel.export.checkpoint.ties import checked
from satchel.export.checkpoint.tokenizer import check_vocabulary, chosen_tokenizer
from satchel.export.checkpoint.torch_file import from_tensor, read_torch
from satchel.export.errors import ExportError
from satchel.export.python_file import run_file
from satchel.graphs.ir.weights import LazyWeight

_ARGUMENTS = ("input_ids", "position_ids", "attention")


@dataclass(frozen=True)
class ModuleFacts:
    """The facts about a custom module that satchel cannot read from its weights.

    Attributes:
        vocab_size: The last dimension of the logits.
        max_context: Max sequence length in tokens.
        eos_token_ids: The ids that end generation.
        bos_token_id: The id that starts a text.
        pad_token_id: The padding id.

    Raises:
        ValueError: If a count is not positive, or an id is not in the vocabulary.
    """

    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_context"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a positive number")
        if not isinstance(self.eos_token_ids, tuple):
            raise ValueError(f"eos_token_ids is {self.eos_token_ids!r}; it must be a tuple of ids, such as (0,)")
        given = [i for i in (self.bos_token_id, self.pad_token_id) if i is not None]
        for token in (*self.eos_token_ids, *given):
            if not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token!r} is outside the vocabulary of {self.vocab_size} ids")


def open_module(
    module: torch.nn.Module, *, name: str | None = None, tokenizer: Path | None = None, weights: Path | None = None
) -> Checkpoint:
    """Open a custom module as a checkpoint; it is set to evaluation mode and otherwise unchanged.

    Args:
        module: A module that follows the protocol above.
        name: Its name in the manifest; the class name by default.
        tokenizer: A tokenizer.json, a SentencePiece `.model` or a folder with either; if None, the bundle takes ids.
        weights: A file of tensors (torch.save of a state_dict, or safetensors) to use instead of the module's own.

    Raises:
        ExportError: If the module does not follow the protocol, or the tokenizer does not fit it.
    """
    class_name = type(module).__name__
    facts = _facts(module, class_name)
    files = None if tokenizer is None else chosen_tokenizer(tokenizer)
    if files is not None:
        check_vocabulary(files, facts.vocab_size, str(tokenizer))
    values = _weights(module, class_name) if weights is None else _stored_weights(module, weights)
    return Checkpoint(
        kind="module",
        name=class_name if name is None else name,
        model_type=class_name,
        module=module.eval(),
        weights=values,
        vocab_size=facts.vocab_size,
        max_context=facts.max_context,
        bos_token_id=facts.bos_token_id,
        eos_token_ids=facts.eos_token_ids,
        pad_token_id=facts.pad_token_id,
        stored_bytes=sum({id(t): t.nbytes for t in module.state_dict(keep_vars=True).values()}.values()),
        tokenizer=files,
        companions={},
    )


def load_module(file: Path, factory: str) -> torch.nn.Module:
    """Run the user's Python file and call `factory()` in it.

    Raises:
        ExportError: If the file or function does not exist or fails, or the result is not a torch module.
    """
    if not file.is_file():
        raise ExportError(f"{file}: no such file; pass file.py:factory with the path of your Python file")
    build = getattr(_run(file), factory, None)
    if not callable(build):
        raise ExportError(f"{file}: has no function {factory}; define it, or name another function after the colon")
    try:
        module = build()
    except Exception as error:
        raise ExportError(f"{file}: {factory}() failed with {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(module, torch.nn.Module):
        raise ExportError(f"{file}: {factory}() returned {type(module).__name__}; return a torch.nn.Module")
    return module


def _run(file: Path) -> ModuleType:
    try:
        loaded = run_file(file, "user")
    except Exception as error:
        raise ExportError(f"{file}: cannot be run: {type(error).__name__}: {one_line(error)}") from error
    if loaded is None:
        raise ExportError(f"{file}: not a Python file; its name must end in .py")
    return loaded


def _facts(module: torch.nn.Module, class_name: str) -> ModuleFacts:
    facts = getattr(module, "satchel", None)
    if not isinstance(facts, ModuleFacts):
        found = "has no attribute `satchel`" if facts is None else f"has {type(facts).__name__} as `satchel`"
        raise ExportError(
            f"{class_name}: {found}; set `satchel = ModuleFacts(vocab_size=..., max_context=...)` on it, "
            "with ModuleFacts from satchel.export"
        )
    parameters = tuple(inspect.signature(module.forward).parameters)
    if parameters != _ARGUMENTS:
        raise ExportError(
            f"{class_name}: forward takes ({', '.join(parameters)}); it must take ({', '.join(_ARGUMENTS)})"
        )
    return facts


def _stored_weights(module: torch.nn.Module, file: Path) -> dict[str, LazyWeight]:
    """The tensors of a file by the names of the module; names that are tied in the module share one."""
    if not file.is_file():
        raise ExportError(f"--weights {file}: no such file; give the file that torch.save wrote")
    stored = read_safetensors(file) if file.suffix == ".safetensors" else read_torch(file)
    wanted = module.state_dict(keep_vars=True)
    stored, _ = without_prefixes(stored, lambda names: len(wanted.keys() & set(names)))
    extra = sorted(stored.keys() - wanted.keys())
    if extra:
        raise ExportError(
            f"{file}: tensor {extra[0]} has no place in {type(module).__name__}; use the file of this module"
        )
    first: dict[int, str] = {}
    for name, tensor in wanted.items():
        tied = first.setdefault(id(tensor), name)
        if name not in stored and tied in stored:
            stored[name] = stored[tied]
    return checked(module, stored, str(file))


def _weights(module: torch.nn.Module, class_name: str) -> dict[str, LazyWeight]:
    shared: dict[int, LazyWeight] = {}
    weights = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_meta:
            raise ExportError(f"{class_name}: {name} is on the meta device and has no values; load the weights first")
        weights[name] = shared.setdefault(id(tensor), from_tensor(name, tensor.cpu()))
    return weights
