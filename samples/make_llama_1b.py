"""Writes a checkpoint of random weights in the shape of a Llama of 1.1 billion parameters, to test large exports.

    python samples/make_llama_1b.py out/llama-1b                       # 2.1 GiB of bfloat16 in five shards
    python samples/make_llama_1b.py out/small --layers 2 --hidden 64   # a small one

Each weight is made and written a few rows at a time, so memory stays below 100 MiB whatever the size.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import tokenizers
from new_path import new_path
from tokenizers import decoders, models, pre_tokenizers

HEAD_DIM = 64
QUERY_HEADS_PER_KV_HEAD = 8
ROWS = 256
"""Rows of a weight in memory at a time."""

Shape = tuple[int, ...]


def shapes(layers: int, hidden: int, inner: int, vocabulary: int) -> dict[str, Shape]:
    """The tensors of a Llama checkpoint, in the order in which they are written."""
    heads = max(1, hidden // HEAD_DIM)
    kv_width = max(1, heads // QUERY_HEADS_PER_KV_HEAD) * HEAD_DIM
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (heads * HEAD_DIM, hidden),
            f"{prefix}.self_attn.k_proj.weight": (kv_width, hidden),
            f"{prefix}.self_attn.v_proj.weight": (kv_width, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads * HEAD_DIM),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (inner, hidden),
            f"{prefix}.mlp.up_proj.weight": (inner, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, inner),
        }
    return tensors | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def shards(tensors: Mapping[str, Shape], limit: int) -> list[dict[str, Shape]]:
    """Split tensors, in order, into shards of at most `limit` bytes (or one tensor)."""
    parts: list[dict[str, Shape]] = [{}]
    used = 0
    for name, shape in tensors.items():
        if parts[-1] and used + 2 * math.prod(shape) > limit:
            parts.append({})
            used = 0
        parts[-1][name] = shape
        used += 2 * math.prod(shape)
    return parts


def values(shape: Shape, rng: np.random.Generator) -> Iterator[bytes]:
    """A weight as bfloat16, a few rows at a time: norms are ones, matrices random and scaled by their width."""
    for start in range(0, shape[0], ROWS):
        rows = (min(ROWS, shape[0] - start), *shape[1:])
        block = (
            np.ones(rows, np.float32) if len(shape) == 1 else rng.standard_normal(rows, np.float32) * shape[1] ** -0.5
        )
        yield (block.view(np.uint32) >> 16).astype(np.uint16).tobytes()  # bfloat16 is the upper half of float32


def write_shard(path: Path, tensors: Mapping[str, Shape], rng: np.random.Generator) -> None:
    """Write one safetensors file: the header's length (8 bytes), the header (JSON), the tensors one after the other."""
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in tensors.values():
            for block in values(shape, rng):
                file.write(block)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer that knows the 256 bytes and an end token."""
    tokens = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    table = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))


def main() -> None:
    """Write the folder that the command line asks for."""
    parser = argparse.ArgumentParser(description="Write a Llama checkpoint of random weights.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--inner", type=int, help="width of the feed-forward layers (default: 2.75 x hidden)")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--shard-bytes", type=int, default=500_000_000)
    args = parser.parse_args()
    if args.hidden % HEAD_DIM:
        parser.error(f"--hidden {args.hidden}: give a multiple of {HEAD_DIM}")
    inner = args.inner or args.hidden * 11 // 4
    tensors = shapes(args.layers, args.hidden, inner, args.vocabulary)
    parts = shards(tensors, args.shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    new_path(args.folder).mkdir()
    rng = np.random.default_rng(0)
    for name, part in zip(names, parts, strict=True):
        write_shard(args.folder / name, part, rng)
    total = sum(2 * math.prod(shape) for shape in tensors.values())
    weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (args.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": args.hidden,
        "intermediate_size": inner,
        "num_hidden_layers": args.layers,
        "num_attention_heads": tensors["model.layers.0.self_attn.q_proj.weight"][0] // HEAD_DIM,
        "num_key_value_heads": tensors["model.layers.0.self_attn.k_proj.weight"][0] // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 2048,
        "vocab_size": args.vocabulary,
        "bos_token_id": None,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
    }
    (args.folder / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(args.folder)
    print(f"{args.folder}: {total // 2 / 1e6:,.1f} M parameters in {len(parts)} shards")


if __name__ == "__main__":
    main()
