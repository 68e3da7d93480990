"""Reads checkpoints lazily: a Hugging Face folder, a GGUF file or a custom module."""

from satchel.export.checkpoint.module import ModuleFacts, open_module
from satchel.export.checkpoint.open import open_checkpoint
from satchel.export.checkpoint.record import Checkpoint
from satchel.export.checkpoint.tokenizer import TokenizerFiles

__all__ = ["Checkpoint", "ModuleFacts", "TokenizerFiles", "open_checkpoint", "open_module"]
