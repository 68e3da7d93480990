"""Write a Llama checkpoint with its residual stream rotated by a random orthogonal matrix: same model, other weights.

    python samples/rotate_checkpoint.py CHECKPOINT OUTPUT [--seed 1]

A checkpoint whose weights lie on a 4-bit grid flatters schemes that use the same grid; rotated, its weights are on no
grid. CHECKPOINT is a Hugging Face folder or a GGUF file of a Llama; OUTPUT becomes a folder. The norm weights
move into the layers behind them, so a tied head is untied afterwards.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from new_path import new_path
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def orthogonal(size: int, seed: int) -> torch.Tensor:
    """A random orthogonal matrix [size, size] float64, uniform over all of them."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return q * r.diagonal().sign()


@torch.no_grad()
def rotate(model: LlamaForCausalLM, seed: int) -> None:
    """Rotate the residual stream of `model` in place; its logits stay the same but for rounding."""
    body, turn = model.model, orthogonal(model.config.hidden_size, seed)

    def read(linear: torch.nn.Linear, gain: torch.Tensor) -> None:
        linear.weight.copy_((linear.weight.double() * gain.double()) @ turn)

    def write(linear: torch.nn.Linear) -> None:
        linear.weight.copy_(turn.T @ linear.weight.double())

    head = torch.nn.Parameter(model.lm_head.weight.clone())
    model.lm_head.weight = head
    model.config.tie_word_embeddings = False
    read(model.lm_head, body.norm.weight)
    body.norm.weight.fill_(1)
    body.embed_tokens.weight.copy_(body.embed_tokens.weight.double() @ turn)
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            read(linear, layer.input_layernorm.weight)
        for linear in (mlp.gate_proj, mlp.up_proj):
            read(linear, layer.post_attention_layernorm.weight)
        write(attention.o_proj)
        write(mlp.down_proj)
        layer.input_layernorm.weight.fill_(1)
        layer.post_attention_layernorm.weight.fill_(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    new_path(args.output)
    path: Path = args.checkpoint
    where = (str(path.parent), {"gguf_file": path.name}) if path.is_file() else (str(path), {})
    model = AutoModelForCausalLM.from_pretrained(where[0], dtype=torch.float32, **where[1])
    if not isinstance(model, LlamaForCausalLM):
        parser.error(f"{path} is a {type(model).__name__}: this script knows how to turn a LlamaForCausalLM")
    ids = torch.arange(100, 164)[None]
    with torch.no_grad():
        before = model(ids).logits
        rotate(model, args.seed)
        error = ((model(ids).logits - before).abs().max() / before.abs().max()).item()
    if error > 1e-4:
        parser.exit(1, f"the turned model's logits differ by {error:.1e} of the largest\n")
    config = LlamaConfig(**{k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(args.output)
    AutoTokenizer.from_pretrained(where[0], **where[1]).save_pretrained(args.output)
    print(f"wrote {args.output}: logits differ by {error:.1e} of the largest")


if __name__ == "__main__":
    main()
