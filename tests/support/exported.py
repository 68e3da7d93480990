"""Each family exported once for all tests of a session, opened beside transformers' own model of the same weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.families import FAMILIES, VOCABULARY, Family, Model, logits_of, reference, save
from support.shared import made_once

from satchel.export import ExportConfig, export_bundle
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.open_bundle import open_bundle

PROMPT, CHUNK, STEPS = 20, 9, 40
"""Tokens of the long prompt, tokens fed at a time (neither divides the other, both beyond the window), decode steps."""


@dataclasses.dataclass(frozen=True)
class Exported:
    """A family's bundle and the reference for it.

    Attributes:
        folder: The bundle.
        weights: The checkpoint's tensors, as transformers holds them.
        ids: PROMPT + STEPS random token ids.
        logits: The reference's logits for `ids`, [sequence, vocabulary].
    """

    family: Family
    folder: Path
    manifest: Manifest
    engine: Engine
    weights: dict[str, torch.Tensor]
    reference: Model
    ids: NDArray[np.int64]
    logits: NDArray[np.float32]


_EXPORTED: dict[str, Exported] = {}


def exported(name: str, places: pytest.TempPathFactory) -> Exported:
    """The family of that name in `FAMILIES`, exported as fp32 on first use."""
    if name not in _EXPORTED:
        _EXPORTED[name] = _open(FAMILIES[name], made_once(places, name, lambda place: _export(FAMILIES[name], place)))
    return _EXPORTED[name]


def _export(family: Family, place: Path) -> None:
    checkpoint, folder = save(family, place / "checkpoint"), place / "bundle"
    export_bundle(checkpoint, ExportConfig(folder, "fp32", max_context=family.context, certificate=False))


def _open(family: Family, place: Path) -> Exported:
    weights, bundle = stored_weights(place / "checkpoint"), open_bundle(place / "bundle")
    model = reference(family, weights)
    ids = np.random.default_rng(1).integers(3, VOCABULARY, PROMPT + STEPS)
    engine = Engine.open(bundle, threads=1)
    return Exported(family, bundle.folder, bundle.manifest, engine, weights, model, ids, logits_of(model, ids))


def stored_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The float32 state dict, as transformers' own loader reads the folder."""
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    weights: dict[str, torch.Tensor] = load(checkpoint, dtype=torch.float32, local_files_only=True).state_dict()
    return weights


def difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest difference, as a part of the largest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
