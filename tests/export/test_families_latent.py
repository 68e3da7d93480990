"""Families of latent attention keep the latent of each token: smaller caches, and the answers of transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.dynamic_graphs import together
from support.exported import CHUNK, PROMPT, Exported, difference, exported, stored_weights
from support.families import FAMILIES, LATENT, TOLERANCE, by_family, logits_of, reference, save

from satchel.export import ExportConfig, ExportError, export_bundle
from satchel.runtime.bundle.manifest import CacheLayer
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.kv_cache import position_bytes
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.prefix_cache import PrefixCache
from satchel.runtime.ort.open_bundle import open_bundle

FAMILIES_OF_LATENTS = ("minicpm3", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "kimi_linear",
                       "bailing_hybrid")  # fmt: skip
KEPT = LATENT["kv_lora_rank"] + LATENT["qk_rope_head_dim"]
LENGTHS, NEXT = (13, 5, 9), np.asarray([11, 50, 96])


@pytest.fixture(params=by_family(FAMILIES_OF_LATENTS, lambda name: name == "minicpm3"))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(request.param, tmp_path_factory)


def export(name: str, place: Path, **options: object) -> Path:
    checkpoint = save(FAMILIES[name], place / "checkpoint")
    config = {"precision": "fp32", "max_context": 64, "certificate": False, **options}
    export_bundle(checkpoint, ExportConfig(place / "bundle", **config))  # type: ignore[arg-type]
    return place / "bundle"


def test_a_token_costs_its_latent_and_its_rotated_channels(family: Exported) -> None:
    layers = family.manifest.kv_cache.layers
    assert {(layer.kv_heads, layer.key_dim, layer.value_dim, layer.past_value) for layer in layers} == {
        (1, KEPT, 0, None)
    }
    assert position_bytes(family.manifest.kv_cache) == 4 * KEPT * len(layers)
    state = family.engine.new_state(PROMPT)
    assert {array.shape for array in state.cache.past.values()} == {(1, 1, state.cache.capacity, KEPT)}


@pytest.mark.parametrize("chunk", [1, 2, CHUNK, PROMPT])
def test_prompts_in_chunks_give_the_logits_of_transformers(family: Exported, chunk: int) -> None:
    state = family.engine.new_state(len(family.ids))
    found = [family.engine.prefill(state, family.ids[:PROMPT], chunk=chunk).copy()]
    found += [family.engine.decode(state, int(token)).copy() for token in family.ids[PROMPT:]]
    assert max(difference(a, b) for a, b in zip(found, family.logits[PROMPT - 1 :], strict=True)) <= TOLERANCE


def test_rows_of_a_batch_give_the_logits_of_each_alone(family: Exported) -> None:
    rows = [family.ids[3 * i : 3 * i + length] for i, length in enumerate(LENGTHS)]
    batch = family.engine.new_batch(len(rows), 20)
    for ids in rows:
        family.engine.prefill(batch.add(), ids)
    batch.decode(NEXT.tolist())
    padded = [] if family.manifest.states else together(family.folder, rows, NEXT)
    for index, (row, token) in enumerate(zip(rows, NEXT, strict=True)):
        expected = logits_of(family.reference, np.append(row, token))
        assert difference(batch.logits[index], expected[-1]) <= TOLERANCE
        for found, wanted in zip(padded, expected[-2:], strict=False):
            assert difference(found[index], wanted) <= TOLERANCE


def test_a_second_turn_goes_on_here_and_from_a_file(family: Exported, tmp_path: Path) -> None:
    manifest = family.manifest

    def generator() -> Generator:
        store = PrefixCache(manifest.kv_cache, 64 << 20, manifest.model.rotary_border, manifest.states)
        return Generator(family.engine, None, manifest.model.max_context, store)

    def greedy(ids: list[int], count: int) -> list[int]:
        text = list(ids)
        for _ in range(count):
            text.append(int(logits_of(family.reference, np.asarray(text))[-1].argmax()))
        return text[len(ids) :]

    here, elsewhere, prompt = generator(), generator(), family.ids[:17].tolist()
    answer = list(here.generate(prompt, 9).token_ids)
    assert answer == greedy(prompt, 9)
    fed = [*prompt, *answer][:-1]
    assert here.save_state(tmp_path / "talk.state", [*prompt, *answer]) == len(fed)
    elsewhere.load_state(tmp_path / "talk.state")
    turn = [*prompt, *answer, *family.ids[20:25].tolist()]
    for each in (here, elsewhere):
        found = each.generate(turn, 8)
        assert (found.reused_tokens, list(found.token_ids)) == (len(fed), greedy(turn, 8))


def test_the_expanded_form_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    bundle = open_bundle(export("minicpm3", tmp_path, latent_cache="expanded"))
    (first, _) = bundle.manifest.kv_cache.layers
    assert (first.kv_heads, first.key_dim, first.value_dim) == (4, 32, 24)
    ids = np.random.default_rng(1).integers(3, 97, 24)
    wanted = logits_of(reference(FAMILIES["minicpm3"], stored_weights(tmp_path / "checkpoint")), ids)
    assert difference(Engine.open(bundle, threads=1).score(ids), wanted) <= TOLERANCE


def test_what_is_not_latent_attention_cannot_be_compressed(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"--latent-cache compressed.*no latent attention"):
        export("llama", tmp_path, latent_cache="compressed")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"latent_cache": "small"}, ("--latent-cache small", "compressed or expanded")),
        ({"latent_cache": "compressed", "target": "cann", "precision": "fp16"}, ("--latent-cache", "--target cann")),
        ({"kv_cache": "int8"}, ("--kv-cache int8", "--kv-cache float")),
    ],
)
def test_what_a_latent_cache_does_not_go_with_is_refused(
    options: dict[str, str], facts: tuple[str, ...], tmp_path: Path
) -> None:
    with pytest.raises(ExportError) as caught:
        export("minicpm3", tmp_path, **options)
    assert all(fact in str(caught.value) for fact in facts), caught.value
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_bundles_keep_latents_and_both_halves_of_the_matrix_in_float(precision: str, tmp_path: Path) -> None:
    bundle = open_bundle(export("minicpm3", tmp_path, precision=precision))
    assert {layer.past_value for layer in bundle.manifest.kv_cache.layers} == {None}
    assert not [name for name in bundle.manifest.layers if "kv_b_proj" in name]
    assert [name for name in bundle.manifest.layers if "kv_a_proj_with_mqa" in name]
    ids = np.random.default_rng(1).integers(3, 97, 40)
    wanted = logits_of(reference(FAMILIES["minicpm3"], stored_weights(tmp_path / "checkpoint")), ids)
    found = Engine.open(bundle, threads=1).score(ids)
    correlation = np.corrcoef(found.ravel(), wanted.ravel())[0, 1]
    assert correlation >= (0.995 if precision == "int8" else 0.85)


def test_inspect_says_what_a_token_costs(tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle = exported("minicpm3", tmp_path_factory)
    done = subprocess.run(
        [sys.executable, "-m", "satchel.runtime.cli.main", "inspect", str(bundle.folder)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert f"{2 * KEPT * 4:,} bytes" in done.stdout
    assert f"latent of {KEPT}" in done.stdout


def test_a_layer_names_its_values_or_has_none() -> None:
    with_values = CacheLayer(2, 8, 4, "a", "b", "c", "d")
    assert with_values.buffers == (("a", "c", 8), ("b", "d", 4))
    assert CacheLayer(1, 8, 0, "a", None, "c", None).buffers == (("a", "c", 8),)
