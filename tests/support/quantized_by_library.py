"""Writes tests/data/quantized/: tiny checkpoints as GPTQModel and AutoAWQ pack them, with their logits.

    python tests/support/quantized_by_library.py

The libraries are not among those that the tests install: they pin other versions of torch and transformers. The files
were written by gptqmodel 7.7.0 and autoawq 0.2.9, of which only packing and unpacking of layers is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Pack = Callable[[torch.nn.Linear], tuple[Tensors, torch.Tensor]]
"""From a layer to its tensors in the format, and the weight [outputs, inputs] that the library makes of them."""

PLACE = Path(__file__).parents[1] / "data" / "quantized"
VOCABULARY, GROUP = 64, 32
IDS = np.random.default_rng(4).integers(3, VOCABULARY, 20)
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def grid(weight: torch.Tensor, bits: int, group_of: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points [groups, outputs] for groups of inputs."""
    scales, zeros = [], []
    for group in range(int(group_of.max()) + 1):
        part = weight[:, group_of == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).half().float()
        scales.append(scale)
        zeros.append((-low / scale).round().clamp(1, 2**bits - 1))
    return torch.stack(scales), torch.stack(zeros)


def gptq(bits: int, version: int, act_order: bool) -> Pack:
    """GPTQModel's layer; it packs version 2, from which its own function makes version 1."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    def pack(linear: torch.nn.Linear) -> tuple[Tensors, torch.Tensor]:
        inputs, outputs = linear.in_features, linear.out_features
        group_of = torch.arange(inputs) // GROUP
        if act_order:
            group_of = group_of[torch.from_numpy(np.random.default_rng(inputs).permutation(inputs))]
        scales, zeros = grid(linear.weight.data, bits, group_of)
        layer = TorchLinear(
            bits=bits, group_size=GROUP, sym=False, desc_act=act_order, in_features=inputs, out_features=outputs,
            bias=False, pack_dtype=torch.int32,
        )  # fmt: skip
        layer.pack(linear, scales.T.contiguous(), zeros.T.contiguous(), group_of.int())
        layer.post_init()
        layer.eval()
        stored = layer.scales.clone()
        layer.scales = stored.float()
        widened = layer.dequantize_weight().T.float().contiguous()
        layer.scales = stored
        if version == 1:
            convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=bits, group_size=GROUP))
        return {name: getattr(layer, name).clone() for name in PARTS}, widened

    return pack


def awq() -> Pack:
    """AutoAWQ's layer."""
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    def pack(linear: torch.nn.Linear) -> tuple[Tensors, torch.Tensor]:
        group_of = torch.arange(linear.in_features) // GROUP
        scales, zeros = grid(linear.weight.data, 4, group_of)
        scale, zero = scales[group_of].T, zeros[group_of].T
        # The library's layer packs what is on the grid already.
        linear.weight.data = (((linear.weight.data / scale).round() + zero).clamp(0, 15) - zero) * scale
        layer = WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales, zeros=zeros)
        widened = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, GROUP)
        return {name: getattr(layer, name) for name in PARTS[:3]}, widened.T.float().contiguous()

    return pack


def wide_model(**changes: Any) -> Any:
    """A tiny model whose logits depend on each of its weights."""
    from support.checkpoints import tiny_model

    model: Any = tiny_model("llama", **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(1) if "norm" in name else parameter.mul_(2)
    return model


def write(name: str, settings: dict[str, Any], pack: Pack) -> None:
    """Write one checkpoint."""
    folder = PLACE / name
    model = wide_model(vocab_size=VOCABULARY)
    model.config.save_pretrained(folder)
    tensors: Tensors = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            made, widened = pack(module)
            tensors |= {f"{path}.{part}": tensor.detach().contiguous() for part, tensor in made.items()}
            module.weight.data = widened
    layers = {key.rpartition(".")[0] for key in tensors}
    rest = {
        key: value.clone() for key, value in model.state_dict().items() if key.removesuffix(".weight") not in layers
    }
    save_file(tensors | rest, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    with torch.no_grad():
        np.save(folder / "logits.npy", model(torch.from_numpy(IDS)[None]).logits[0].numpy())


if __name__ == "__main__":
    common = {"quant_method": "gptq", "group_size": GROUP, "sym": False}
    write(
        "gptq", common | {"bits": 4, "desc_act": True, "checkpoint_format": "gptq"}, gptq(4, version=1, act_order=True)
    )
    write(
        "gptq_v2", common | {"bits": 8, "desc_act": False, "checkpoint_format": "gptq_v2"},
        gptq(8, version=2, act_order=False),
    )  # fmt: skip
    write("awq", {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}, awq())
