"""What tests share: a kept trace gives the bundle of a trace made anew, and is of no other model."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import save_tiny
from support.families import FAMILIES, by_family, save
from support.traced import identity

from satchel.export import ExportConfig, export_bundle
from satchel.export.compile import open_source
from satchel.export.tracing.trace import trace

FAMILY = by_family(
    ["llama", "qwen3_5_text", "gemma2", "phi3_long", "mixtral", "gemma3n_text"], lambda name: name == "llama"
)


@pytest.mark.parametrize("name", FAMILY)
def test_a_kept_trace_gives_the_same_bundle(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, context = save(FAMILIES[name], tmp_path / "checkpoint"), FAMILIES[name].context

    def export(folder: str) -> Path:
        export_bundle(checkpoint, ExportConfig(tmp_path / folder, "fp32", max_context=context, certificate=False))
        return tmp_path / folder

    export("first")
    with monkeypatch.context() as patch:
        patch.setattr("support.traced._save", lambda *_: pytest.fail("it was traced again"))
        kept = export("kept")
    monkeypatch.setattr("satchel.export.compile.trace", trace)
    names = [path.name for path in export("anew").iterdir()]
    assert {path.name for path in kept.iterdir()} == set(names)
    assert filecmp.cmpfiles(kept, tmp_path / "anew", names, shallow=False) == (names, [], [])


def _tie(module: Any) -> None:
    module.lm_head.weight = module.model.embed_tokens.weight


CHANGES: dict[str, Callable[[Any], object]] = {
    "a fact of the config": lambda module: setattr(module.config, "rms_norm_eps", 0.1),
    "a fact of a part": lambda module: setattr(module.model.layers[1].self_attn, "scaling", 0.1),
    "a buffer": lambda module: module.model.rotary_emb.inv_freq.mul_(2),
    "a shape": lambda module: setattr(module.lm_head, "weight", torch.nn.Parameter(torch.empty(9, 64, device="meta"))),
    "a tie": _tie,
    "a part": lambda module: module.set_submodule("model.norm", torch.nn.Identity()),
    "a function": lambda module: setattr(module.model.norm, "forward", _tie),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_trace_is_of_one_model(change: str, tmp_path: Path) -> None:
    config = ExportConfig(tmp_path / "bundle", "fp32")
    checkpoints = [
        save_tiny(tmp_path / name, dtype=kind) for name, kind in (("a", torch.float32), ("b", torch.float32))
    ]
    one, same = (open_source(checkpoint, config).module for checkpoint in checkpoints)
    assert identity(one) == identity(same)
    CHANGES[change](same)
    assert identity(one) != identity(same)
