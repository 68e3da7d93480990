"""Exports a decoder that is a plain torch module.

    python samples/own_module.py out/own-tokenizer.json
    satchel export samples/own_module.py:build -o out/own --tokenizer out/own-tokenizer.json
    satchel run out/own "The box" --max-new-tokens 40

The first command writes the tokenizer. The second calls `build()`, which trains the model for a few seconds on the text
below until it has memorized it. The third needs neither torch nor this file.

A module can be exported if it has an attribute `satchel` with the facts that weights do not tell, and a
`forward(input_ids, position_ids, attention)` that calls `attention` once per layer on the new tokens' query, key and
value. In training, `attention` is torch's; in an export it is satchel's, which adds the KV cache.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch
from new_path import new_path
from tokenizers import decoders, models, pre_tokenizers, trainers

from satchel.export import ModuleFacts

Attention = Callable[..., torch.Tensor]

TEXT = """\
The box stood at the end of the pier, and nobody had asked for it. A gull sat on the lid. Every morning the harbor
master walked out to look, wrote a line in his book, and walked back again. The box had no name on it, no number and no
lock. In the second week he knocked. Something inside knocked back, twice, as politely as a clock. He wrote that down
too, and brought a chair. From then on the two of them kept watch together, one inside and one outside, and the gull,
who had seen the sea bring stranger things, went to sleep.
"""

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER = 4, 64, 4, 2, 16, 128
VOCABULARY, CONTEXT, END = 320, 256, "<end>"
STEPS, BATCH, WINDOW, LEARNING_RATE = 200, 16, 64, 0.005


class Layer(torch.nn.Module):
    """Attention with fewer key than query heads, then a feed-forward layer, each with a norm in front."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = torch.nn.RMSNorm(HIDDEN, eps=1e-5)
        self.query = torch.nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
        self.key = torch.nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.value = torch.nn.Linear(HIDDEN, KV_HEADS * HEAD_DIM, bias=False)
        self.output = torch.nn.Linear(HEADS * HEAD_DIM, HIDDEN, bias=False)
        self.feed_norm = torch.nn.RMSNorm(HIDDEN, eps=1e-5)
        self.up = torch.nn.Linear(HIDDEN, INNER)
        self.down = torch.nn.Linear(INNER, HIDDEN)

    def forward(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], attention: Attention
    ) -> torch.Tensor:
        batch, sequence, _ = x.shape

        def heads(projected: torch.Tensor) -> torch.Tensor:  # -> [batch, heads, sequence, head_dim]
            return projected.view(batch, sequence, -1, HEAD_DIM).transpose(1, 2)

        normed = self.attention_norm(x)
        query, key = (rotate(heads(part(normed)), rotation) for part in (self.query, self.key))
        mixed = attention(query, key, heads(self.value(normed)))  # [batch, heads, sequence, head_dim]
        x = x + self.output(mixed.transpose(1, 2).reshape(batch, sequence, HEADS * HEAD_DIM))
        return x + self.down(torch.nn.functional.gelu(self.up(self.feed_norm(x))))


class Decoder(torch.nn.Module):
    """Four layers between an embedding and a head that share one weight; positions by a table of rotations."""

    def __init__(self, end_id: int) -> None:
        super().__init__()
        self.satchel = ModuleFacts(vocab_size=VOCABULARY, max_context=CONTEXT, eos_token_ids=(end_id,))
        self.embedding = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = torch.nn.RMSNorm(HIDDEN, eps=1e-5)
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        angles = torch.arange(CONTEXT)[:, None] / 10000 ** (torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
        self.register_buffer("cos", torch.cat((angles, angles), dim=1).cos())  # [context, head_dim]
        self.register_buffer("sin", torch.cat((angles, angles), dim=1).sin())
        torch.nn.init.normal_(self.embedding.weight, std=0.1)

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention: Attention) -> torch.Tensor:
        """Logits [batch, sequence, vocabulary] of the tokens given."""
        look_up = torch.nn.functional.embedding
        rotation = look_up(position_ids, self.cos)[:, None], look_up(position_ids, self.sin)[:, None]
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, rotation, attention)
        return self.head(self.norm(x))


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate each pair of channels (i, i + head_dim / 2) by its position's angle (RoFormer, Su et al. 2021)."""
    cos, sin = rotation  # each [batch, 1, sequence, head_dim]
    first, second = x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def make_tokenizer(text: str = TEXT, vocabulary: int = VOCABULARY) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer learned from a text: it can encode anything, and this text in few tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def build() -> Decoder:
    """Train the model: always the same weights on the same machine."""
    tokenizer = make_tokenizer()
    end = tokenizer.token_to_id(END)
    text = torch.tensor([*tokenizer.encode(TEXT).ids, end])
    windows = text.unfold(0, WINDOW + 1, 1)  # [starts, window + 1]: each stretch of the text
    positions = torch.arange(WINDOW)[None]
    torch.set_num_threads(1)  # for matrices so small more threads only wait for each other
    torch.manual_seed(7)
    model = Decoder(end)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    for _ in range(STEPS):
        batch = windows[torch.randint(len(windows), (BATCH,))]
        logits = model(batch[:, :-1], positions, causal)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention of a whole text at once, for training."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python samples/own_module.py TOKENIZER.json")
    path = new_path(Path(sys.argv[1]))
    make_tokenizer().save(str(path))
    print(f"wrote {path}, a tokenizer with {VOCABULARY} entries")
