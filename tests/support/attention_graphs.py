"""One attention layer as the tracer writes it, fed in chunks through its KV cache, beside the same in plain numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from support.graphs import attention, build, normal, rotated, rotation_tables, session

BATCH, TOTAL, POSITIONS = 2, 13, 17


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer; `rotary` is how many channels of each head turn, `window` and `softcap` are 0 for none."""

    heads: int = 6
    kv_heads: int = 2
    width: int = 16
    value_width: int = 16
    scale: float = 0.31
    window: int = 0
    softcap: float = 0.0
    rotary: int = 0
    pairs: bool = False

    def sizes(self) -> dict[str, tuple[int, int]]:
        """(heads, width) of each of query, key and value."""
        return {"q": (self.heads, self.width), "k": (self.kv_heads, self.width), "v": (self.kv_heads, self.value_width)}

    def tokens(self, batch: int = 1) -> dict[str, np.ndarray]:
        """Seeded q, k and v [batch, TOTAL, heads * width]."""
        shapes = {name: heads * width for name, (heads, width) in self.sizes().items()}
        return {name: normal(seed, batch, TOTAL, n) for seed, (name, n) in enumerate(shapes.items())}

    def tables(self) -> dict[str, np.ndarray]:
        """The halves of the rotation's tables [POSITIONS, rotary / 2] that the standard operator reads."""
        tables = zip(("cos", "sin"), rotation_tables(7, POSITIONS, self.rotary), strict=True)
        return {name: table[:, : self.rotary // 2] for name, table in tables}

    def graph(self, *changes: tuple[str, str], **tables: np.ndarray) -> ir.Model:
        """The traced form, with some pieces of its text replaced."""
        return build(self._text(), *changes, **((self.tables() if self.rotary else {}) | tables))

    def _text(self) -> str:
        sizes = self.sizes()
        inputs = ", ".join(f"float[batch,sequence,{h * w}] {n}" for n, (h, w) in sizes.items())
        spread = [
            f"{n}_heads = Reshape({n}, {n}_shape) {n}_moved = Transpose<perm = [0, 2, 1, 3]>({n}_heads)" for n in sizes
        ]
        partial = self.rotary if self.rotary < self.width else 0
        turned = [
            f"{n}_turned = RotaryEmbedding<interleaved = {int(self.pairs)}, rotary_embedding_dim = {partial}>"
            f"({n}_moved, cos, sin, position_ids)"
            for n in ("q", "k")
            if self.rotary
        ]
        shapes = ", ".join(f"int64[4] {n}_shape = {{0, 0, {h}, {w}}}" for n, (h, w) in sizes.items())
        form = "turned" if self.rotary else "moved"
        out = self.heads * self.value_width
        options = f"layer = 3, scale = {self.scale}, window = {self.window}, softcap = {float(self.softcap)}"
        return f"""({inputs}, int64[batch,sequence] input_ids, int64[batch,sequence] position_ids,
            int64[batch,total] attention_mask) => (float[batch,sequence,{out}] y)
            <{shapes}, int64[3] out_shape = {{0, 0, {out}}},
             float[batch,sequence,{self.heads},{self.value_width}] mixed> {{
            {" ".join(spread)} {" ".join(turned)}
            mixed = satchel.Attention<{options}>(q_{form}, k_{form}, v_moved)
            y = Reshape(mixed, out_shape)
        }}"""

    def plain(self, tokens: dict[str, np.ndarray], row: int = 0, length: int = TOTAL) -> np.ndarray:
        """The layer's output [length, heads * value_width] for the first tokens of one row, without a cache."""
        parts = []
        for name, (heads, width) in self.sizes().items():
            part = tokens[name][row, :length].reshape(length, heads, width).swapaxes(0, 1)
            if self.rotary and name != "v":
                part = rotated(part, *self.tables().values(), self.pairs)
            parts.append(part)
        mixed = attention(*parts, self.scale, self.window, self.softcap)
        return mixed.reshape(length, -1)


class Cached:
    """Runs a fused layer on chunks of tokens, and hands its cache on from call to call."""

    def __init__(self, model: ir.Model, batch: int = 1, capacity: int = TOTAL) -> None:
        self.session = session(model)
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        # Rows beyond those written hold a value that would show in any sum.
        types = {
            value.name: np.int8 if value.type == "tensor(int8)" else np.float32 for value in self.session.get_inputs()
        }
        self.cache = {
            name: np.full((batch, shape[1], capacity, shape[3]), 127 if types[name] == np.int8 else 1e3, types[name])
            for name, shape in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def feed(self, tokens: dict[str, np.ndarray], lengths: Sequence[int]) -> np.ndarray:
        """The output for new `tokens` [batch, new, ...] where each row is `lengths` long with them."""
        new = next(iter(tokens.values())).shape[1]
        mask = (np.arange(max(lengths)) < np.asarray(lengths)[:, None]).astype(np.int64)
        first = np.maximum(np.asarray(lengths) - new, 0)
        feeds = {
            **tokens,
            **self.cache,
            "input_ids": np.zeros((len(lengths), new), np.int64),
            "attention_mask": mask,
            "position_ids": first[:, None] + np.arange(new),
        }
        values = self.session.run(self.outputs, {n: a for n, a in feeds.items() if n in self.inputs})
        found = dict(zip(self.outputs, values, strict=True))
        for name in self.cache:
            self.cache[name] = found[name.replace("past_key_values", "present")]
        return found["y"]

    def feed_chunks(self, tokens: dict[str, np.ndarray], *starts: int) -> np.ndarray:
        """The output for one row of tokens, cut at `starts`."""
        total = next(iter(tokens.values())).shape[1]
        parts = []
        for start, stop in zip((0, *starts), (*starts, total), strict=True):
            parts.append(self.feed({n: a[:, start:stop] for n, a in tokens.items()}, [stop]))
        return np.concatenate(parts, 1)
