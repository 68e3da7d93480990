"""Bundles of a tiny model with two adapters that are kept apart, beside peft's own models of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from numpy.typing import NDArray
from support.checkpoints import save_tiny, tiny_model
from support.shared import made_once

from satchel.export import ExportConfig, export_bundle

ADAPTERS: dict[str, dict[str, Any]] = {
    "style": {"target_modules": ["q_proj", "v_proj", "gate_proj", "down_proj"]},
    "facts": {"target_modules": ["q_proj", "k_proj", "o_proj", "up_proj"], "r": 3, "use_rslora": True},
}
IDS = [5, 9, 33, 71, 12, 8, 40, 100, 3, 77]


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A bundle with `ADAPTERS`; `models` has peft's model of each, and the base under None."""

    folder: Path
    models: dict[str | None, torch.nn.Module]

    def logits(self, adapter: str | None, ids: list[int] = IDS) -> NDArray[np.float32]:
        """The logits of peft's model, [sequence, vocabulary]."""
        with torch.no_grad():
            found: NDArray[np.float32] = self.models[adapter](torch.tensor([ids])).logits[0].numpy()
        return found

    def greedy(self, adapter: str | None, count: int, ids: list[int] = IDS) -> tuple[int, ...]:
        """The most likely tokens after `ids` by peft's model, one after the other."""
        tokens = list(ids)
        for _ in range(count):
            tokens.append(int(self.logits(adapter, tokens)[-1].argmax()))
        return tuple(tokens[len(ids) :])


def trained(family: str, folder: Path, seed: int = 3, name: str = "default", **settings: Any) -> peft.PeftModel:
    """A model with an adapter of random values in all that it may train, saved in `folder`."""
    made = peft.get_peft_model(tiny_model(family), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **settings}), name)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    made.save_pretrained(folder)
    return made


def adapted(precision: str, places: pytest.TempPathFactory) -> Adapted:
    """The bundle in a precision, made once for a session; `int8-MORE` is one of its own, for a test that changes it."""
    place = made_once(places, f"adapted-{precision}", lambda place: _export(precision.partition("-")[0], place))
    models = {name: _model(name, place) for name in ADAPTERS}
    return Adapted(place / "bundle", {None: tiny_model("llama"), **models})


def _export(precision: str, place: Path) -> None:
    save_tiny(place / "base", tokenizer=True)
    (place / "base/chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        trained("llama", place / name, seed, **settings)
    config = ExportConfig(
        place / "bundle", precision, certificate=False, adapter_form="separate",
        adapters=tuple(f"{name}={place / name}" for name in ADAPTERS),
    )  # fmt: skip
    export_bundle(place / "base", config)


def _model(name: str, place: Path) -> torch.nn.Module:
    return peft.PeftModel.from_pretrained(tiny_model("llama"), str(place / name)).eval()
