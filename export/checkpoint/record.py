"""What every kind of checkpoint is read into."""

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
    """A causal language model as its source holds it, opened but not read.

    Attributes:
        kind: Which reader opened it.
        name: The folder's or file's name, without its path.
        model_type: `model_type` of the config, or the class name of the user's own module.
        module: The model in evaluation mode, in float32. Parameters and persistent buffers are on the meta device (real
            for kind "module"); buffers that no checkpoint stores, such as `inv_freq`, are real and hold their values.
        weights: One entry for each name in `module.state_dict()`, float32 (integers and booleans keep their dtype).
            Tied names map to the same object. Values are read from the source when asked for, and not kept.
        vocab_size: Number of rows of the logits.
        max_context: The longest sequence the model was made for, in tokens.
        bos_token_id: The id that starts a sequence, if there is one.
        eos_token_ids: Every id that ends a generation; may be empty.
        pad_token_id: The id for padding, if there is one.
        stored_bytes: Bytes of the tensors in the source.
        tokenizer: The tokenizer to put in the bundle; None where the source has none.
        companions: Content of further files for the bundle, by the name they have there: chat template, generation
            config, license, model card.
        sources: The files that it is read from; none for a module that was handed over.
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

    @property
    def parameters(self) -> int:
        """The number of weights, tied ones counted once."""
        return sum(weight.size for weight in {id(w): w for w in self.weights.values()}.values())

    @property
    def layers(self) -> int | None:
        """The number of layers that the config promises; None for a module of the user's own."""
        layers = self.fact("num_hidden_layers")
        return layers if self.kind != "module" else None

    def fact(self, name: str) -> int | None:
        """A whole number from the config, or None where there is none of that name."""
        value = getattr(getattr(self.module, "config", None), name, None)
        return value if isinstance(value, int) else None
