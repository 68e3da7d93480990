"""Keys of generation_config.json against transformers' generate with the same keys, over one exported model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.command import Satchel

from satchel.export.checkpoint import open_checkpoint
from satchel.export.checkpoint.companions import generation_complaints
from satchel.runtime import Generator
from satchel.runtime.errors import SatchelWarning
from satchel.runtime.generation.generation_config import complaints, stored_options, without_wrong
from satchel.runtime.generation.options import GenerationOptions

PROMPT = [5, 9, 31, 9, 12]
NEW = 12


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def generator(tiny_bundle: Path) -> Generator:
    return Generator.open(tiny_bundle, threads=1, specialize=False)


@pytest.fixture(scope="module")
def greedy(generator: Generator) -> list[int]:
    return list(generator.generate(PROMPT, NEW).token_ids)


def settings(greedy: list[int], name: str) -> dict[str, Any]:
    """Settings that change the greedy continuation of `PROMPT`."""
    first, second, third = greedy[:3]
    return {
        "suppress_tokens": {"suppress_tokens": [first, third]},
        "begin_suppress_tokens": {"begin_suppress_tokens": [first]},
        "bad_words_ids": {"bad_words_ids": [[first, second], [third]]},
        "sequence_bias": {"sequence_bias": [[[first], -0.5], [[PROMPT[-1], first], -9.0]]},
        "forced_eos_token_id": {"forced_eos_token_id": 7},
        "repetition_penalty": {"repetition_penalty": 0.2},
        "no_repeat_ngram_size": {"repetition_penalty": 0.2, "no_repeat_ngram_size": 2},
        "eos_and_min_new_tokens": {"min_new_tokens": 4, "eos_token_id": [second, third]},
        "eos_and_min_length": {"min_length": len(PROMPT) + 3, "eos_token_id": [first, second]},
        "decay": {"exponential_decay_length_penalty": [2, 4.0], "eos_token_id": [7, 8]},
        "together": {
            "suppress_tokens": [first], "bad_words_ids": [[second]], "repetition_penalty": 1.3,
            "sequence_bias": [[[7], 1.5]], "no_repeat_ngram_size": 2, "renormalize_logits": True,
        },
    }[name]  # fmt: skip


NAMES = [
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_eos_token_id",
    "repetition_penalty", "no_repeat_ngram_size", "eos_and_min_new_tokens", "eos_and_min_length", "decay", "together",
]  # fmt: skip


def asked_of(generator: Generator, wanted: dict[str, Any]) -> tuple[Generator, dict[str, Any]]:
    """A generator whose model has the end tokens of `wanted`, and the other options."""
    ends = tuple(wanted.get("eos_token_id", ()))
    engine = generator.engine
    model = dataclasses.replace(engine.bundle.manifest.model, eos_token_ids=ends)
    manifest = dataclasses.replace(engine.bundle.manifest, model=model)
    object.__setattr__(engine.bundle, "manifest", manifest)
    return generator, stored_options(wanted, {})


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_transformers(
    name: str, generator: Generator, greedy: list[int], reference: transformers.PreTrainedModel
) -> None:
    wanted = settings(greedy, name)
    ends = wanted.get("eos_token_id", [])
    config = transformers.GenerationConfig(
        **{"eos_token_id": None, "pad_token_id": 0, **wanted}, max_new_tokens=NEW, do_sample=False
    )
    made = reference.generate(torch.tensor([PROMPT]), generation_config=config, attention_mask=torch.ones(1, 5))
    right = made[0, len(PROMPT) :].tolist()
    right = right[: next((i for i, token in enumerate(right) if token in ends), len(right))]
    assert right != greedy
    generator, options = asked_of(generator, wanted)
    options["max_new_tokens"] = NEW
    assert list(generator.generate(PROMPT, **options).token_ids) == right
    assert list(generator.generate(PROMPT, **options).token_ids) == right  # from the prefix cache
    batch = generator.generate_batch([PROMPT, [3, 4], PROMPT], rows=3, **options)
    assert [list(batch[0].token_ids), list(batch[2].token_ids)] == [right, right]
    if not ends:
        config.num_beams, config.num_return_sequences = 3, 3
        beams = reference.generate(torch.tensor([PROMPT]), generation_config=config, attention_mask=torch.ones(1, 5))
        found = generator.beam_search(PROMPT, 3, **options)
        assert [list(each.token_ids) for each in found] == beams[:, len(PROMPT) :].tolist()


def test_a_stored_value_is_judged_after_what_is_given() -> None:
    stored = {"do_sample": True, "temperature": 0.0, "top_k": -1, "min_new_tokens": 50}
    with pytest.warns(SatchelWarning, match=r"temperature 0.*--temperature"), pytest.warns(match=r"top_k -1.*--top-k"):
        left = stored_options(stored, {})
    assert left == {"temperature": 1.0, "top_k": 50, "min_new_tokens": 50}
    with pytest.warns(SatchelWarning, match=r"top_k -1.*--top-k"):
        assert stored_options(stored, {"temperature": 0.7})["top_k"] == 50
    assert stored_options(stored, {"temperature": 0, "max_new_tokens": 3}) == {"min_new_tokens": 3}
    found = stored_options(stored, {"temperature": 0.7, "top_k": 20, "max_new_tokens": 3})
    GenerationOptions(**found).updated({"temperature": 0.7, "top_k": 20, "max_new_tokens": 3}).check_all(100)
    assert stored_options({"do_sample": "yes", "top_k": "x"}, {"temperature": 0}) == {}
    assert stored_options({"max_new_tokens": 4}, {"min_new_tokens": 9})["max_new_tokens"] == 9


WRONG = {
    "bad_words_ids": ([5, [6], "x", [[]], [[-1]], [["a"]]], "--bad-words-ids"),
    "sequence_bias": ([7, [[5, 1.0]], [[[5]]], [[[5], "x"]], {"5": 1.0}, [[[], 1.0]]], "--sequence-bias"),
    "suppress_tokens": ([[-5], 5, [1.5], [True], "5"], "--suppress-tokens"),
    "forced_eos_token_id": ([-1, [], "x", True], "--forced-eos-token-id"),
    "exponential_decay_length_penalty": ([[1], 3, [1.5, 2.0], [1, "x"], [1, -2.0]], "--exponential-decay"),
    "stop_strings": ([[""], 5, [5]], "--stop"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_malformed_value_is_named_and_left_out_at_export_and_at_run_time(key: str) -> None:
    values, flag = WRONG[key]
    for value in values:
        stored = {key: value, "no_repeat_ngram_size": 3}
        with pytest.warns(SatchelWarning, match=f"generation_config.json: {key} .*{flag}") as warned:
            assert stored_options(stored, {}) == {"no_repeat_ngram_size": 3}
        (line,) = complaints(stored, 100)
        assert str(warned[0].message).endswith(line)
        assert "\n" not in line
        assert without_wrong(stored, 100) == {"no_repeat_ngram_size": 3}


def test_ids_beyond_the_vocabulary_are_named_and_left_out() -> None:
    for key, value in {
        "suppress_tokens": [5, 100],
        "bad_words_ids": [[5], [6, 100]],
        "forced_bos_token_id": 100,
    }.items():
        (line,) = complaints({key: value}, 100)
        assert line.startswith(key)
        assert "100" in line
        assert without_wrong({key: value, "top_p": 0.5}, 100) == {"top_p": 0.5}
        with pytest.warns(SatchelWarning, match=f"{key}: token id 100 is outside"):
            assert stored_options({key: value}, {}, 100) == {}
    assert complaints({"sequence_bias": [[[99], 100.0]]}, 100) == []


def test_a_wrong_value_never_blocks_a_command(tmp_path: Path, tiny_checkpoint: Path, satchel: Satchel) -> None:
    """It is named when the checkpoint is exported, and its bundle runs without a word."""
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    shutil.copytree(tiny_checkpoint, checkpoint)
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0].content }}")
    stored = {"suppress_tokens": 5, "bad_words_ids": [[7], [448]], "top_k": 7}
    (checkpoint / "generation_config.json").write_text(json.dumps(stored))
    said = satchel("export", checkpoint, "-o", bundle, "-p", "fp32", "--no-certificate").err
    warned = [line for line in said.splitlines() if line.startswith("warning") and "generation_config.json" in line]
    assert [("suppress_tokens 5" in line, "id 448" in line) for line in warned] == [(True, False), (False, True)]
    for command in (("run",), ("run", "--raw"), ("run", "--beams", 2), ("chat",)):
        assert "generation_config" not in satchel(command[0], bundle, "the cat", "-n", 2, *command[1:]).err
    assert json.loads((bundle / "generation_config.json").read_text()) == {"top_k": 7}


def test_keys_that_are_not_followed_are_named_unless_they_have_no_effect(tmp_path: Path, tiny_checkpoint: Path) -> None:
    quiet = transformers.GenerationConfig(eos_token_id=[1, 2], do_sample=True, top_p=0.9).to_dict()
    assert complaints(quiet | {"guidance_scale": 1.0, "num_beams": 1, "max_length": 20}, 100) == []
    (line,) = complaints({"num_beams": 4, "guidance_scale": 1.5, "novelty": True, "top_p": 0.5}, 100)
    assert all(part in line for part in ("num_beams 4", "guidance_scale 1.5", "novelty True"))
    assert "top_p" not in line
    for path in tiny_checkpoint.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"penalty_alpha": 0.6}))
    (line,) = generation_complaints(open_checkpoint(tmp_path).companions, 100)
    assert "penalty_alpha 0.6" in line
