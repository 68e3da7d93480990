"""Writes a checkpoint anew as GPTQ does, rounded to the nearest.

python tests/support/gptq_checkpoint.py SOURCE FOLDER BITS
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.quantized import gptq, save_quantized

from satchel.export.checkpoint import open_checkpoint

GROUP = 32


def main(source: str, folder: str, bits: int) -> None:
    """Widen the source, and write its linear layers but the head in GPTQ's layout; the rest stays in float32."""
    checkpoint = open_checkpoint(Path(source))
    module = checkpoint.module
    state = {name: torch.from_numpy(weight.numpy().copy()) for name, weight in checkpoint.weights.items()}
    module.load_state_dict(state, assign=True)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": False, "sym": True}
    save_quantized(Path(folder), settings, gptq(bits, GROUP), module)
    tokenizer = checkpoint.tokenizer
    if tokenizer is not None and isinstance(tokenizer.file, bytes):
        (Path(folder) / "tokenizer.json").write_bytes(tokenizer.file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
