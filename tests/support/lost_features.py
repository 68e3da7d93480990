"""Ways to take a feature away from a reference model, so that a test can show that its loss would be noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

Model = transformers.PreTrainedModel


def skipping(*leaves: str) -> Callable[[Model], None]:
    """Replace the submodules of these names by the identity."""

    def change(model: Model) -> None:
        found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves]
        if not found:
            raise ValueError(f"no module is called {' or '.join(leaves)}")
        for name in found:
            model.set_submodule(name, torch.nn.Identity())

    return change


def zeroing(*endings: str) -> Callable[[Model], None]:
    """Set the parameters whose names end so to zero."""

    def change(model: Model) -> None:
        found = [p for name, p in model.named_parameters() if name.endswith(endings)]
        if not found:
            raise ValueError(f"no parameter ends in {' or '.join(endings)}")
        for parameter in found:
            torch.nn.init.zeros_(parameter)

    return change


def unrotated(model: Model) -> None:
    """Rotate by nothing, wherever the token stands."""
    for name, module in model.named_modules():
        if name.endswith("rotary_emb"):
            forward = module.forward

            def still(*args: Any, forward: Any = forward, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
                cos, sin = forward(*args, **options)
                return torch.ones_like(cos), torch.zeros_like(sin)

            module.forward = still  # type: ignore[method-assign]


def unscaled_embeddings(model: Model) -> None:
    """Gemma's embeddings as they are stored."""
    model.get_input_embeddings().embed_scale.fill_(1.0)


def uncentered(model: Model) -> None:
    """Norms that leave the mean in, as root-mean-square norms do."""
    for module in model.modules():
        if type(module).__name__.endswith("LayerNorm"):

            def scale_only(x: torch.Tensor, module: Any = module) -> torch.Tensor:
                return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)

            module.forward = scale_only  # type: ignore[method-assign]


def sequential(model: Model) -> None:
    """Feed-forward after attention instead of beside it, for blocks with one norm."""
    for layer in model.get_decoder().layers:

        def forward(hidden: torch.Tensor, layer: Any = layer, **options: Any) -> torch.Tensor:
            attended = hidden + layer.self_attn(hidden_states=layer.input_layernorm(hidden), **options)[0]
            return attended + layer.mlp(layer.input_layernorm(attended))

        layer.forward = forward


def without_sinks(model: Model) -> None:
    """Give the sinks a share of nothing."""
    sinks = [parameter for name, parameter in model.named_parameters() if name.endswith("sinks")]
    if not sinks:
        raise ValueError("the model has no sinks")
    for parameter in sinks:
        torch.nn.init.constant_(parameter, -1e9)


def without_distance(model: Model) -> None:
    """BLOOM and MPT without the bias of ALiBi."""
    for module in model.modules():
        if hasattr(module, "inv_norm_factor"):
            module.beta = 0.0
        if hasattr(module, "build_mpt_alibi_tensor"):
            module.build_mpt_alibi_tensor = lambda heads, length, *_, **__: torch.zeros(heads, 1, length)


def stateless(model: Model) -> None:
    """Let each layer with a convolution forget, at every token, all tokens before."""
    mixers = [m for m in model.modules() if any(isinstance(part, torch.nn.Conv1d) for part in m.children())]
    if not mixers:
        raise ValueError("the model has no convolutions")
    for module in mixers:

        def alone(hidden_states: torch.Tensor, forward: Any = module.forward, **_: Any) -> torch.Tensor:
            found: torch.Tensor = forward(hidden_states.reshape(-1, 1, hidden_states.shape[-1]))
            return found.reshape(*hidden_states.shape[:2], -1)

        module.forward = alone  # type: ignore[method-assign]


def zeroing_positions(model: Model) -> None:
    """GPT-J and CodeGen without rotation: sines of 0, cosines of 1."""
    for module in model.modules():
        if hasattr(module, "embed_positions"):
            half = module.embed_positions.shape[-1] // 2
            module.embed_positions[:, :half], module.embed_positions[:, half:] = 0.0, 1.0
