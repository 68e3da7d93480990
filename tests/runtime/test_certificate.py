"""Certificates: what they record, what moves them, and what a manifest may say in one."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from support.tiny_bundle import VOCABULARY, read_manifest, set_at, write_bundle

from satchel.runtime.bundle import strict_json
from satchel.runtime.bundle.certificate import Certificate, EvaluatedText, GoldenPosition, Margin
from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.evaluation import certify
from satchel.runtime.evaluation.certify import check_certificate, golden_kl, golden_position, make_certificate
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.open_bundle import open_bundle

RNG = np.random.default_rng(5)
WINDOWS = [RNG.integers(3, VOCABULARY, 20) for _ in range(2)]
PROMPTS = [(0, 3, 16), (1, 4, 5)]
TEXT = EvaluatedText("book.txt", "0" * 64, 1234)


@pytest.fixture(scope="module")
def certificate(engine: Engine) -> Certificate:
    return make_certificate(engine, engine.score, TEXT, WINDOWS, PROMPTS, skip=4, decode_windows=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The engine of a bundle with other weights."""
    folder = write_bundle(tmp_path_factory.mktemp("bundles") / "other", seed=1)
    return Engine.open(open_bundle(folder), threads=1)


def test_a_certificate_says_what_was_measured_and_on_what(certificate: Certificate) -> None:
    assert (certificate.text, certificate.windows, certificate.decode_windows) == (TEXT, 2, 1)
    assert (certificate.window_tokens, certificate.skip) == (20, 4)
    assert certificate.prefill.kl_mean < 1e-6 > certificate.decode.kl_mean
    assert (certificate.onnxruntime, certificate.provider) == (onnxruntime.__version__, "cpu")
    assert certificate.processor.strip()
    assert certificate.margin == certify.MARGIN
    assert certificate.speed is None
    for (index, count, new), prompt in zip(PROMPTS, certificate.prompts, strict=True):
        assert [*prompt.ids, *prompt.continuation] == list(WINDOWS[index][: count + new])
        assert len(prompt.continuation) == len(prompt.positions) == len(prompt.greedy_ids) == len(prompt.gaps) == new
        assert all(len(position.ids) == len(position.logits) == 16 for position in prompt.positions)


def test_golden_prompts_hold_the_references_predictions(engine: Engine, certificate: Certificate) -> None:
    prompt, rows = certificate.prompts[0], engine.score(WINDOWS[0])
    for row, position in zip(rows[2:], prompt.positions, strict=False):
        best = np.argsort(-row)[:16]
        assert list(position.ids) == list(best)
        np.testing.assert_allclose(position.logits, row[best], atol=1e-4)
        whole = math.log(sum(math.exp(float(value)) for value in row))
        assert np.logaddexp.reduce([*position.logits, position.rest]) == pytest.approx(whole, abs=1e-3)
    assert prompt.kl < 1e-6


@pytest.mark.parametrize("logits", [[2, 5, 5, 1, 5, 2], [3, 3, 3], [1, 4], [np.log(2)] * 40])
def test_equal_logits_are_recorded_in_the_order_of_their_ids(logits: list[float]) -> None:
    values = np.array(logits, np.float32)
    count = min(4, len(values) - 1)
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    found = golden_position(values, top=4)
    assert list(found.ids) == order[:count]
    others = [float(values[token]) for token in order[count:]]
    assert found.rest == pytest.approx(math.log(sum(map(math.exp, others))), abs=1e-4)


def test_golden_prompts_hold_the_bundles_own_continuation(engine: Engine, certificate: Certificate) -> None:
    prompt = certificate.prompts[0]
    ids = list(prompt.ids)
    for token, gap in zip(prompt.greedy_ids, prompt.gaps, strict=True):
        row = engine.score(ids)[-1]
        second, best = np.sort(row)[-2:]
        assert token == row.argmax()
        assert gap == pytest.approx(float(best) - float(second), abs=1e-4)
        ids.append(token)


def test_a_golden_prompts_kl_is_the_mean_over_prefill_and_decode(engine: Engine) -> None:
    noise = np.random.default_rng(8).normal(0, 1, VOCABULARY).astype(np.float32)
    blurred = make_certificate(engine, lambda ids: engine.score(ids) + noise, None, WINDOWS, [(0, 6, 4)], skip=4)
    rows = engine.score(WINDOWS[0])
    expected = [golden_kl(golden_position(rows[i] + noise), rows[i]) for i in range(5, 9)]
    assert blurred.prompts[0].kl == pytest.approx(np.mean(expected), rel=1e-4)
    assert blurred.prompts[0].kl > 0.05


def test_a_certificate_goes_through_json(tiny: Path, certificate: Certificate) -> None:
    document = {**read_manifest(tiny), "certificate": strict_json.to_json(certificate)}
    assert Manifest.from_json(json.loads(json.dumps(document))).certificate == certificate


def test_a_certificate_has_the_tail_of_the_divergence(engine: Engine) -> None:
    noise = np.random.default_rng(9).normal(0, 1, VOCABULARY).astype(np.float32)
    prefill = make_certificate(engine, lambda ids: engine.score(ids) + noise, None, WINDOWS, PROMPTS, skip=4).prefill
    rows = np.concatenate([engine.score(window)[4:] for window in WINDOWS]).astype(np.float64)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (rows + noise, rows))
    divergences = (p * np.log(p / q)).sum(-1)
    assert prefill.kl_p999 == pytest.approx(np.percentile(divergences, 99.9), rel=1e-3)
    assert prefill.kl_max == pytest.approx(divergences.max(), rel=1e-3)
    assert prefill.flips == np.sum(p.argmax(-1) != q.argmax(-1)) > 0
    assert type(prefill.flips) is int


def test_a_certificate_from_before_the_tail_was_recorded_is_read(tiny: Path, certificate: Certificate) -> None:
    document = {**read_manifest(tiny), "certificate": strict_json.to_json(certificate)}
    for phase in ("prefill", "decode"):
        for key in ("kl_p999", "kl_max", "flips"):
            del document["certificate"][phase][key]
    read = Manifest.from_json(document).certificate
    assert read is not None
    assert (read.prefill.kl_max, read.decode.flips) == (None, None)
    assert read.prefill.kl_mean == certificate.prefill.kl_mean
    assert strict_json.to_json(read) == document["certificate"]


def test_the_bundle_that_was_certified_holds_to_its_certificate(engine: Engine, certificate: Certificate) -> None:
    assert check_certificate(engine, certificate) == []


def test_other_weights_move_each_prompt(other: Engine, certificate: Certificate) -> None:
    lines = check_certificate(other, certificate)
    assert lines[0].startswith("prompt 1: KL ")
    assert lines[1].startswith(
        f"prompt 1: new token 1 is {certify.replay(other, certificate.prompts[0]).greedy_ids[0]}"
    )
    assert lines[2].startswith("prompt 2: KL ")
    assert lines[-1].startswith("all prompts: KL ")


def with_margin(certificate: Certificate, **changes: float) -> Certificate:
    return dataclasses.replace(certificate, margin=dataclasses.replace(certificate.margin, **changes))


def test_the_margins_are_what_decides(other: Engine, certificate: Certificate) -> None:
    wide = with_margin(certificate, kl_absolute=1e3)
    assert all("new token" in line for line in check_certificate(other, wide))
    wide = with_margin(certificate, logit=1e3)
    assert all("KL" in line for line in check_certificate(other, wide))
    assert check_certificate(other, with_margin(wide, kl_absolute=1e3)) == []


def test_a_kl_may_grow_by_both_margins_together_and_no_more(certificate: Certificate) -> None:
    prompts = [dataclasses.replace(prompt, kl=0.1) for prompt in certificate.prompts]
    recorded = dataclasses.replace(certificate, margin=Margin(0.5, 0.01, 1.0), prompts=tuple(prompts))
    for kl, expected in ((0.0, 0), (0.159, 0), (0.161, 3)):
        found = [certify.Replay(kl, prompt.greedy_ids, prompt.gaps) for prompt in prompts]
        assert len(certify.mismatches(recorded, found)) == expected
    uneven = [
        certify.Replay(kl, prompt.greedy_ids, prompt.gaps) for kl, prompt in zip((0.2, 0.0), prompts, strict=True)
    ]
    assert [line.split(":")[0] for line in certify.mismatches(recorded, uneven)] == ["prompt 1"]


@pytest.mark.parametrize(("recorded", "found", "holds"), [(0.9, 3, True), (3, 0.9, True), (1.1, 1.1, False)])
def test_a_token_may_be_another_only_where_either_gap_is_small(
    certificate: Certificate, recorded: float, found: float, holds: bool
) -> None:
    def gaps(value: float) -> tuple[float, ...]:
        return (5.0, 5.0, value, *([5.0] * 13))

    prompt = dataclasses.replace(certificate.prompts[0], gaps=gaps(recorded))
    alone = dataclasses.replace(with_margin(certificate, logit=1.0), prompts=(prompt,))
    # All tokens after the third are other ones too: they follow another text and say nothing.
    tokens = (*prompt.greedy_ids[:2], *((token + 1) % VOCABULARY for token in prompt.greedy_ids[2:]))
    lines = certify.mismatches(alone, [certify.Replay(prompt.kl, tokens, gaps(found))])
    assert (lines == []) == holds
    assert holds or "new token 3 is" in lines[0]


def test_all_tokens_beyond_the_best_are_one_class() -> None:
    logits = np.array([1.0, 4.0, 2.0, 3.0, 0.0], np.float32)
    position = golden_position(logits, top=2)
    assert position == GoldenPosition((1, 3), (4.0, 3.0), round(math.log(math.e + math.e**2 + 1), 4))
    assert golden_kl(position, logits) == pytest.approx(0, abs=1e-8)
    assert golden_kl(position, logits[[0, 1, 4, 3, 2]]) == pytest.approx(0, abs=1e-8)  # changes within the rest only
    other = np.array([2.0, 0.0, 2.0, 3.0, 1.0], np.float32)
    p, q = (np.exp(row) / np.exp(row).sum() for row in (logits, other))
    p, q = ([row[1], row[3], 1 - row[1] - row[3]] for row in (p, q))
    expected = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert golden_kl(position, other) == pytest.approx(expected, rel=1e-3)


def test_a_vocabulary_below_the_number_of_best_ids_keeps_one_for_the_rest() -> None:
    logits = np.array([1.0, 4.0, 2.0], np.float32)
    position = golden_position(logits)
    assert (position.ids, position.rest) == ((1, 2), 1.0)
    assert golden_kl(position, logits) == 0


def test_logits_that_are_not_finite_are_refused(engine: Engine, certificate: Certificate) -> None:
    with pytest.raises(BundleError, match="the bundle's logits are not finite"):
        golden_kl(golden_position(np.arange(5, dtype=np.float32)), np.array([1, 2, np.nan, 3, 4], np.float32))


def test_what_cannot_be_certified_is_refused(engine: Engine) -> None:
    with pytest.raises(PromptError, match="at least one golden prompt"):
        make_certificate(engine, engine.score, None, WINDOWS, [], skip=4)
    for prompt in ((2, 3, 4), (-1, 3, 4), (0, 0, 4), (0, 3, 0), (0, 10, 11)):
        with pytest.raises(
            PromptError, match=rf"a golden prompt of {prompt[1]} \+ {prompt[2]} tokens is not in window"
        ):
            make_certificate(engine, engine.score, None, WINDOWS, [prompt], skip=4)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["surprise"], 1, "unknown key 'certificate.surprise'"),
        (["windows"], "2", "'certificate.windows' must be a whole number"),
        (["prompts"], [], r"'certificate.prompts' must be a non-empty list"),
        (["prompts", 0, "gaps"], [1.0], r"'certificate.prompts\[0\].gaps' must be 16 entries"),
        (["prompts", 0, "ids"], [], r"'certificate.prompts\[0\].ids' must be ids that fit the context"),
        (["prompts", 0, "ids"], [5] * 50, r"'certificate.prompts\[0\].ids' must be ids that fit the context"),
        (["prompts", 1, "ids"], [400], r"'certificate.prompts\[1\]' must be token ids below model.vocab_size"),
        (["prompts", 0, "kl"], math.nan, r"'certificate.prompts\[0\]' must be finite numbers"),
        (["prompts", 0, "positions", 0, "ids"], [1], r"'certificate.prompts\[0\].positions' must be as many ids as"),
        (["margin", "logit"], math.inf, "'certificate.margin' must be finite numbers"),
    ],
)
def test_a_certificate_that_does_not_add_up_is_refused(
    tiny: Path, certificate: Certificate, path: list[Any], value: Any, message: str
) -> None:
    document = {**read_manifest(tiny), "certificate": copy.deepcopy(strict_json.to_json(certificate))}
    set_at(document["certificate"], path, value)
    with pytest.raises(BundleError, match=message):
        Manifest.from_json(document)


def test_the_manifest_must_say_whether_there_is_a_certificate(tiny: Path) -> None:
    document = read_manifest(tiny)
    del document["certificate"]
    with pytest.raises(BundleError, match="missing key 'certificate'"):
        Manifest.from_json(document)
