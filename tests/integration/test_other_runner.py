"""SmolLM2's bundles in onnxruntime-genai, which opens the folders as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.conftest import NEW_TOKENS, Reference
from support.export_command import satchel
from support.genai import by_genai, by_satchel

from satchel.runtime import Engine, open_bundle

pytestmark = pytest.mark.slow


def test_onnxruntime_genai_generates_the_same_tokens(smollm2: Path, reference: Reference, tmp_path: Path) -> None:
    ((tokens, _),) = by_genai(smollm2, [reference.prompt_ids], NEW_TOKENS, tmp_path)
    assert tokens == reference.greedy_ids


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_its_tokens_are_those_of_satchel_in_few_bits(
    precision: str, gguf: Path, reference: Reference, tmp_path: Path
) -> None:
    """int8 has a graph for each phase, with different kernels; int4 hands its kernels a session entry."""
    bundle = tmp_path / precision
    done = satchel("export", gguf, "-o", bundle, "--precision", precision, "--no-certificate")
    assert done.returncode == 0, done.stderr
    ((expected, _),) = by_satchel(Engine.open(open_bundle(bundle), threads=2), [reference.prompt_ids], NEW_TOKENS)
    ((tokens, _),) = by_genai(bundle, [reference.prompt_ids], NEW_TOKENS, tmp_path)
    assert tokens == expected
    assert len(tokens) == NEW_TOKENS
    assert len(set(tokens)) > 15
