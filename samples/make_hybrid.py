"""Writes a checkpoint of random weights in the shape of a small hybrid model, to time its recurrences and convolutions.

    python samples/make_hybrid.py qwen3.5-0.8b out/qwen      # GatedDeltaNet in three of four layers
    python samples/make_hybrid.py lfm2-350m out/lfm2         # short convolutions in ten of sixteen layers

The shapes are those of the published configurations. The tokenizer knows the 256 bytes and an end token.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from make_llama_1b import write_tokenizer
from new_path import new_path

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3.5-0.8b": {
        "model_type": "qwen3_5_text",
        "vocab_size": 248320,
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 262144,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": True,
    },
    "lfm2-350m": {
        "model_type": "lfm2",
        "vocab_size": 65536,
        "hidden_size": 1024,
        "intermediate_size": 6656,  # block_auto_adjust_ff_dim makes 4,608 of it
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "conv_L_cache": 3,
        "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
}


def main() -> None:
    """Write the folder that the command line asks for."""
    parser = argparse.ArgumentParser(description="Write a hybrid checkpoint of random weights.")
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    config = transformers.AutoConfig.for_model(
        **SHAPES[args.shape], bos_token_id=None, eos_token_id=0, pad_token_id=None
    )
    new_path(args.folder).mkdir()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(args.folder)
    write_tokenizer(args.folder)
    print(f"{args.folder}: {model.num_parameters() / 1e6:,.1f} M parameters")


if __name__ == "__main__":
    main()
