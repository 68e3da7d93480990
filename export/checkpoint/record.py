"""The common representation of all kinds of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from satchel.export.checkpoint.tokenizer import TokenizerFiles
from satchel.graphs.ir.weights import LazyWeight


@dataclass(frozen=True)
class Checkpoint:
    """A causal language model in its source format, opened but not read.

    Attributes:
        kind: The reader that opened it.
        name: The folder's or file's name, without its path.
        model_type: `model_type` of the config, or the class name of a custom module.
        module: The model in evaluation mode, in float32. Parameters and persistent buffers are on the meta device (real
            for kind "module"); buffers that checkpoints do not store, such as `inv_freq`, are real.
        weights: One entry for each name in `module.state_dict()`, float32 (integers and booleans keep their dtype).
            Tied names map to the same object. Values are read from the source on demand, and not kept.
        vocab_size: The last dimension of the logits.
        max_context: The context length of the model, in tokens.
        bos_token_id: The id that starts a sequence, if any.
        eos_token_ids: All ids that end generation; may be empty.
        pad_token_id: The padding id, if any.
        stored_bytes: Total bytes of the tensors in the source.
        tokenizer: The tokenizer for the bundle; None if the source has none.
        companions: Contents of further files for the bundle, by their names there: chat template, generation
            config, license, model card.
        sources: The files that it is read from; empty for a module object.
        notes: What the user should know about how it was read, one line each.
    """

    kind: Literal["huggingface", "gguf", "module"]
    name: str
    model_type: str
    module: torch.nn.Module
    weights: Mapping[str, LazyWeight]
    vocab_size: int
    max_context: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    stored_bytes: int
    tokenizer: TokenizerFiles | None
    companions: Mapping[str, bytes | Path]
    sources: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """The number of weights, counting tied weights once."""
        return sum(weight.size for weight in {id(w): w for w in self.weights.values()}.values())

    @property
    def layers(self) -> int | None:
        """The number of layers in the config; None for a custom module."""
        layers = self.fact("num_hidden_layers")
        return layers if self.kind != "module" else None

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The kind of each layer in the config; empty if it names none, or for a custom module."""
        kinds = getattr(getattr(self.module, "config", None), "layer_types", None)
        return tuple(map(str, kinds or ())) if self.kind != "module" else ()

    def fact(self, name: str) -> int | None:
        """Return an integer from the config, or None if it has none of that name."""
        value = getattr(getattr(self.module, "config", None), name, None)
        return value if isinstance(value, int) else None
