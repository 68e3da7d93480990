"""SmolLM2's bundles in onnxruntime-genai, which opens the folders as they are."""

from __future__ import annotations

from pathlib import Path

import pytest
from integration.conftest import NEW_TOKENS, PROMPT, Reference
from support.export_command import satchel
from support.genai import by_genai, by_satchel

from satchel.runtime import Generator

pytestmark = pytest.mark.slow

# The layers' forms are those of the recipes that ship; plain rounding takes seconds, and kernels are what is tested.
TABLES = """[[rule]]
kinds = ["embedding", "head"]
bits = 8
blocks = [64]
rounding = "nearest"
"""
RECIPES = {
    "int8": """[[rule]]
kinds = ["linear"]
bits = 8
blocks = ["channel"]
rounding = "nearest"
prefill = "token"
decode = "tensor"
""",
    "int4": """[[rule]]
bits = 4
blocks = [64]
rounding = "nearest"
""",
}


def test_onnxruntime_genai_generates_the_same_tokens(smollm2: Path, reference: Reference, tmp_path: Path) -> None:
    ((tokens, _),) = by_genai(smollm2, [reference.prompt_ids], NEW_TOKENS, tmp_path)
    assert tokens == reference.greedy_ids


@pytest.mark.parametrize("precision", RECIPES)
def test_its_tokens_are_those_of_satchel_in_few_bits(precision: str, gguf: Path, tmp_path: Path) -> None:
    """int8 has a graph for each phase, with different kernels; int4 hands its kernels a session entry."""
    bundle = tmp_path / precision
    recipe = tmp_path / "plain.toml"
    recipe.write_text(TABLES + RECIPES[precision], encoding="utf-8")
    chosen = ("--precision", precision, "--recipe", recipe)
    done = satchel("export", gguf, "-o", bundle, *chosen, "--no-certificate")
    assert done.returncode == 0, done.stderr
    generator = Generator.open(bundle, threads=2)
    assert generator.tokenizer is not None
    prompts = [[int(token) for token in generator.tokenizer.encode(PROMPT)]]
    ((expected, _),) = by_satchel(generator.engine, prompts, NEW_TOKENS)
    ((tokens, _),) = by_genai(bundle, prompts, NEW_TOKENS, tmp_path)
    assert tokens == expected
    assert len(tokens) == NEW_TOKENS
    assert len(set(tokens)) > 15
