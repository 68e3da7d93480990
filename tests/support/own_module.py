"""A module of a user's own, following the protocol, and attention for it in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from satchel.export import ModuleFacts

VOCABULARY, HIDDEN, HEADS, KV_HEADS, KEY_DIM, LAYERS, CONTEXT = 61, 48, 4, 2, 16, 2, 64

Attention = Callable[..., torch.Tensor]


class OwnModule(torch.nn.Module):
    """Learned positions, two layers of grouped-query attention, and a head that is the embedding table.

    Args:
        value_dim: Width of a value head; keys are `KEY_DIM` wide.
        window: How many positions back a token sees in the first layer; None is no limit. The second has none.
        softcap: Bound of the second layer's scores, or None.
    """

    def __init__(self, value_dim: int, window: int | None = None, softcap: float | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.satchel = ModuleFacts(vocab_size=VOCABULARY, max_context=CONTEXT)
        self.options = [{"window": window}, {"softcap": softcap, "scale": 0.4}]
        self.tokens = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.positions = torch.nn.Embedding(CONTEXT, HIDDEN)
        widths = {"query": HEADS * KEY_DIM, "key": KV_HEADS * KEY_DIM, "value": KV_HEADS * value_dim}
        self.products = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(HIDDEN, width) for name, width in widths.items()})
            for _ in range(LAYERS)
        )
        self.outputs = torch.nn.ModuleList(torch.nn.Linear(HEADS * value_dim, HIDDEN) for _ in range(LAYERS))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(HIDDEN) for _ in range(LAYERS + 1))
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight
        with torch.no_grad():
            for parameter in [*self.products.parameters(), *self.outputs.parameters()]:
                parameter.normal_(std=0.3)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention: Attention) -> torch.Tensor:
        hidden = self.tokens(input_ids) + self.positions.weight[position_ids]
        for options, products, output, norm in zip(self.options, self.products, self.outputs, self.norms, strict=False):
            normed = norm(hidden)
            heads = [
                products[name](normed).unflatten(-1, (count, -1)).transpose(1, 2)
                for name, count in (("query", HEADS), ("key", KV_HEADS), ("value", KV_HEADS))
            ]
            hidden = hidden + output(attention(*heads, **options).transpose(1, 2).flatten(2))
        logits: torch.Tensor = self.head(self.norms[-1](hidden))
        return logits


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """What the protocol promises, for a whole sequence: query [batch, heads, sequence, key_dim] -> [.., value_dim]."""
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(query.shape[2])
    distance = position[:, None] - position
    seen = (distance >= 0) & (distance < (len(position) if window is None else window))
    return scores.masked_fill(~seen, float("-inf")).softmax(-1) @ value
