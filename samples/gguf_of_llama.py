"""Writes a GGUF file from a Llama checkpoint, to benchmark llama.cpp on the same shape.

    python samples/gguf_of_llama.py out/llama-1b out/llama-1b-Q8_0.gguf --type Q8_0
    python samples/gguf_of_llama.py out/llama-1b out/llama-1b-Q4_0.gguf --type Q4_0

For random weights (`samples/make_llama_1b.py`): the vocabulary is made up, so such a file is good for speed only.
Matrices have the given type, the head is Q8_0, norms are float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from new_path import new_path
from safetensors import safe_open

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{NAMES[part]}.weight"


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order of GGUF, which rotates adjacent channels."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(checkpoint: Path, output: Path, kind: gguf.GGMLQuantizationType) -> None:
    config = transformers.AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    words = ["<unk>", "<s>", "</s>", *(f"word{i}" for i in range(3, config.vocab_size))]
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
                           + [gguf.TokenType.NORMAL] * (len(words) - 3))  # fmt: skip
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (it is no mapping)
                weight = file.get_tensor(name).to(torch.float32).numpy()
                part = name.removesuffix(".weight").rpartition(".")[2]
                if part in heads:
                    weight = interleaved(weight, heads[part])
                wanted = gguf.GGMLQuantizationType.Q8_0 if part == "lm_head" else kind
                if weight.ndim == 1:
                    writer.add_tensor(gguf_name(name), weight)
                else:
                    writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a GGUF file from a Llama checkpoint, to time llama.cpp with.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--type", choices=["Q8_0", "Q4_0"], default="Q8_0")
    options = parser.parse_args()
    write(options.checkpoint, new_path(options.output), gguf.GGMLQuantizationType[options.type])
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
