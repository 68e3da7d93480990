"""Evaluates rotary modules into lookup tables of cosines and sines by position.

The tables include any scaling of the module (linear, NTK, YaRN, Llama 3, longrope). Where it depends on the length of
the text, a table has two blocks of rows: first those of texts up to the border, then those of longer ones. Only the
lookup is traced.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from satchel.export.errors import ExportError


@contextlib.contextmanager
def tables_for_rotary(module: torch.nn.Module, capacity: int) -> Iterator[None]:
    """Replace each rotary module's forward during the trace with a lookup in its table for positions 0 .. capacity - 1.

    Where `border_of` is below the capacity, the table's rows 0 .. border - 1 are those of texts up to the border, and
    position p of a longer text has row border + p.

    Raises:
        ExportError: A rotary module does not return cosines and sines.
    """
    replaced: list[tuple[torch.nn.Module, list[str]]] = []
    restore = contextlib.ExitStack()
    try:
        for part in list(module.modules()):
            forward = part.forward
            parameters = inspect.signature(forward).parameters
            if (
                "RotaryEmbedding" not in type(part).__name__
                or "position_ids" not in parameters
                or list(part.parameters())
            ):
                continue
            kinds: object = getattr(part, "rope_type", None)
            keys = sorted(kinds) if isinstance(kinds, dict) else [None]
            names: list[str] = []
            replaced.append((part, names))
            borders = {key: border_within(part, capacity, key) for key in keys}
            for key in keys:
                tables = _evaluated(forward, capacity, borders[key], () if key is None else (key,))
                if isinstance(tables, torch.Tensor) and tables.is_complex():
                    restore.enter_context(_real_rotation(part, tables))
                    tables = tuple(each.repeat_interleave(2, dim=-1) for each in (tables.real, tables.imag))
                if not isinstance(tables, tuple) or len(tables) != 2:
                    raise ExportError(
                        f"{type(part).__name__}: it does not return cosines and sines; this family is not supported"
                    )
                for kind, table in zip(("cos", "sin"), tables, strict=True):
                    names.append(_table_name(kind, key))
                    part.register_buffer(names[-1], table[0].float().contiguous(), persistent=False)
            part.forward = _look_up(part, borders)
        yield
    finally:
        restore.close()
        for part, names in replaced:
            part.__dict__.pop("forward", None)
            for name in names:
                delattr(part, name)


class Rotation(tuple[torch.Tensor, torch.Tensor]):
    """Cosines and sines [batch, sequence, head_dim] in place of the complex numbers that a model passes around."""

    def to(self, *_: object) -> Rotation:
        return self


@contextlib.contextmanager
def _real_rotation(part: torch.nn.Module, table: torch.Tensor) -> Iterator[None]:
    """While it is entered, the `apply_rotary_emb` beside a complex rotary module rotates by real arithmetic.

    Raises:
        ExportError: There is no such function, or it does something else with complex numbers [1, sequence, half].
    """
    module = sys.modules[type(part).__module__]
    original = getattr(module, "apply_rotary_emb", None)
    random = torch.Generator().manual_seed(0)
    heads, length, half = 3, 5, table.shape[-1]
    rotation = Rotation(each[:, :length].repeat_interleave(2, dim=-1) for each in (table.real, table.imag))
    for axis, shape in ((1, (1, heads, length, 2 * half)), (2, (1, length, heads, 2 * half))):
        query, key = torch.randn(2, *shape, generator=random)
        rotate = _rotates(axis)
        try:
            expected = original(query, key, table[:, :length]) if original is not None else ()
        except RuntimeError:  # the shapes do not fit: the heads lie along another axis
            continue
        found = rotate(query, key, rotation)
        if len(expected) == 2 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True)):
            break
    else:
        raise ExportError(
            f"{type(part).__name__}: it has complex rotations of an unknown form; this family is not supported"
        )
    module.apply_rotary_emb = rotate  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.apply_rotary_emb = original  # type: ignore[attr-defined]


def _rotates(axis: int) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """A function that rotates pairs of neighboring channels of queries and keys, whose heads lie along `axis`."""

    def rotate(query: torch.Tensor, key: torch.Tensor, rotation: Rotation) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (each.unsqueeze(axis) for each in rotation)
        turned = (torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) for x in (query, key))
        rotated = [x * cos + y * sin for x, y in zip((query, key), turned, strict=True)]
        return rotated[0], rotated[1]

    return rotate


def border_of(module: torch.nn.Module, kind: str | None = None) -> int | None:
    """The length in tokens beyond which the model turns positions by other angles; None if it never does.

    longrope has two sets of factors, and dynamic NTK scales with the length. `kind` is a kind of layer with rotary
    parameters of its own; None for all.

    Raises:
        ExportError: Several kinds of layers change at different lengths.
    """
    config = getattr(module, "config", None)
    found = set()
    for name, rope in rope_kinds(config).items():
        if kind is not None and name not in ("", kind):
            continue
        if rope.get("rope_type") == "longrope":
            found.add(int(rope["original_max_position_embeddings"]))
        elif rope.get("rope_type") == "dynamic":
            found.add(int(config.max_position_embeddings))  # type: ignore[union-attr]
    if len(found) > 1:
        raise ExportError(f"its rotary embeddings change at several lengths ({sorted(found)}): that is not supported")
    return found.pop() if found else None


def border_within(module: torch.nn.Module, capacity: int, kind: str | None = None) -> int | None:
    """As `border_of`, or None if no text of up to `capacity` tokens is beyond it."""
    border = border_of(module, kind)
    return border if border is not None and border < capacity else None


def varies(module: torch.nn.Module) -> bool:
    """Whether the angles of texts beyond the border are others for each length, as with dynamic NTK."""
    return any(rope.get("rope_type") == "dynamic" for rope in rope_kinds(getattr(module, "config", None)).values())


def rope_kinds(config: object) -> dict[str, dict[str, Any]]:
    """The rotary parameters of a config by kind of layer; "" for those of all layers."""
    rope = getattr(config, "rope_parameters", None)
    rope = rope if isinstance(rope, dict) else {}
    nested = {str(name): part for name, part in rope.items() if isinstance(part, dict)}
    return nested or {"": rope}


def _evaluated(forward: Callable[..., Any], capacity: int, border: int | None, extra: tuple[str, ...]) -> Any:
    """What a rotary module returns for all rows of its table, [1, rows, ...]."""
    lengths = [capacity] if border is None else [border, capacity]  # ascending: dynamic NTK keeps what it grew to
    with torch.no_grad():
        blocks = [forward(torch.zeros(1, dtype=torch.float32), torch.arange(n)[None], *extra) for n in lengths]
    if len(blocks) == 1 or not all(isinstance(block, torch.Tensor | tuple) for block in blocks):
        return blocks[0]
    if isinstance(blocks[0], torch.Tensor):
        return torch.cat(blocks, dim=1)
    return tuple(torch.cat(pair, dim=1) for pair in zip(*blocks, strict=True))


def _table_name(kind: str, key: str | None) -> str:
    return f"rotary_{kind}" if key is None else f"rotary_{kind}_{key}"


def _look_up(
    part: torch.nn.Module, borders: Mapping[str | None, int | None]
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def forward(
        x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if position_ids.ndim == 3:  # a model of images too: a text's tokens have one position along all three axes
            position_ids = position_ids[0]
        border = borders[layer_type]
        rows = position_ids if border is None else torch.ops.satchel.rotary_rows(position_ids, border)
        return Rotation(
            torch.nn.functional.embedding(rows, getattr(part, _table_name(kind, layer_type))) for kind in ("cos", "sin")
        )

    return forward
