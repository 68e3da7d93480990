"""Evaluates rotary modules into lookup tables of cosines and sines by position.

The tables include any scaling of the module (linear, NTK, YaRN, Llama 3, longrope), with the factors for the bundle's
context length. Only the lookup is traced.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator

import torch

from satchel.export.errors import ExportError


@contextlib.contextmanager
def tables_for_rotary(module: torch.nn.Module, capacity: int) -> Iterator[None]:
    """Replace each rotary module's forward during the trace with a lookup in its table for positions 0 .. capacity - 1.

    Raises:
        ExportError: A rotary module does not return cosines and sines.
    """
    replaced: list[tuple[torch.nn.Module, list[str]]] = []
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
            positions = torch.arange(capacity)[None]
            for key in keys:
                extra = () if key is None else (key,)
                with torch.no_grad():
                    tables = forward(torch.zeros(1, dtype=torch.float32), positions, *extra)
                if not isinstance(tables, tuple) or len(tables) != 2:
                    raise ExportError(
                        f"{type(part).__name__}: it does not return cosines and sines (complex rotations, or none); "
                        "this family is not supported"
                    )
                for kind, table in zip(("cos", "sin"), tables, strict=True):
                    names.append(_table_name(kind, key))
                    part.register_buffer(names[-1], table[0].float().contiguous(), persistent=False)
            part.forward = _look_up(part)
        yield
    finally:
        for part, names in replaced:
            part.__dict__.pop("forward", None)
            for name in names:
                delattr(part, name)


def _table_name(kind: str, key: str | None) -> str:
    return f"rotary_{kind}" if key is None else f"rotary_{kind}_{key}"


def _look_up(part: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    def forward(
        x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = (
            torch.nn.functional.embedding(position_ids, getattr(part, _table_name(kind, layer_type)))
            for kind in ("cos", "sin")
        )
        return cos, sin

    return forward
