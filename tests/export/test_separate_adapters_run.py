"""The runner with adapters that are kept apart: each request gets its own, in batches and saved states too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.adapted import ADAPTERS, IDS, Adapted, adapted
from support.command import Satchel
from support.genai import by_genai, by_satchel
from support.jsonl_work import Work, by_id
from support.tiny_bundle import read_manifest

from satchel.runtime.bundle.digest import manifest_digest
from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.evaluation.fidelity import text_ids
from satchel.runtime.generation.conversation import Conversation
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.request import Request
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.tools.pack import pack

ALL = (None, *ADAPTERS)
STEPS = 6
PROMPT = "the cat sat"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return adapted("fp32", tmp_path_factory)


@pytest.fixture
def fresh(made: Adapted) -> Generator:
    return Generator.open(made.folder, threads=1)


def tokens(generator: Generator, adapter: str | None, prompt: list[int] = IDS) -> tuple[int, ...]:
    return generator.generate(prompt, STEPS, adapter=adapter).token_ids


def test_each_request_has_its_own_adapter(made: Adapted, fresh: Generator) -> None:
    wanted = [made.greedy(adapter, STEPS) for adapter in ALL]
    assert len(set(wanted)) == len(ALL)
    assert [tokens(fresh, adapter) for adapter in ALL] == wanted
    assert tokens(fresh, "") == wanted[0]


def test_rows_of_a_batch_have_different_adapters(made: Adapted, fresh: Generator) -> None:
    work = [(adapter, IDS[start:]) for start in range(3) for adapter in ("style", "style", None, "facts")]
    requests = [Request(ids, GenerationOptions(max_new_tokens=STEPS, adapter=adapter)) for adapter, ids in work]
    for rows in (1, 5):
        found: dict[int, Any] = dict(fresh.run_requests(requests, rows=rows))
        for index, (adapter, ids) in enumerate(work):
            assert found[index].token_ids == made.greedy(adapter, STEPS, ids)


def test_neighbors_with_one_adapter_are_decoded_in_one_run(
    made: Adapted, fresh: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = fresh.engine.new_batch(5, 20)
    for adapter in (None, None, "style", "facts", "facts"):
        fresh.engine.prefill(batch.add(adapter), IDS)
    assert all(fresh.engine.invariant_with(adapter) for adapter in ALL)
    runs: list[tuple[int, int]] = []
    kind = type(batch._runner)  # type: ignore[attr-defined]
    decode, one = kind.decode, kind.decode_one
    monkeypatch.setattr(kind, "decode", lambda s, f, c, t: (runs.append((f, len(c))), decode(s, f, c, t)))
    monkeypatch.setattr(kind, "decode_one", lambda s, r, c, t: (runs.append((r, 1)), one(s, r, c, t)))
    batch.decode([7] * 5)
    assert runs == [(0, 2), (2, 1), (3, 2)]
    for row, adapter in enumerate((None, None, "style", "facts", "facts")):
        assert np.abs(batch.logits[row] - made.logits(adapter, [*IDS, 7])[-1]).max() < 2e-6


def test_keys_and_values_of_another_adapter_are_never_reused(made: Adapted, fresh: Generator) -> None:
    reused = [fresh.generate(IDS, STEPS, adapter=adapter).reused_tokens for adapter in (*ALL, *ALL)]
    assert reused == [0, 0, 0, *[len(IDS) - 2] * 3]
    assert [tokens(fresh, adapter) for adapter in ALL] == [made.greedy(adapter, STEPS) for adapter in ALL]


def test_beams_and_samples_have_an_adapter(made: Adapted, fresh: Generator) -> None:
    assert fresh.beam_search(IDS, 1, max_new_tokens=STEPS, adapter="facts")[0].token_ids == made.greedy("facts", STEPS)
    assert fresh.beam_search(IDS, 3, max_new_tokens=STEPS, adapter="style") != fresh.beam_search(
        IDS, 3, max_new_tokens=STEPS
    )
    given = {"max_new_tokens": STEPS, "temperature": 1.0, "top_k": 1, "adapter": "style"}
    assert {each.token_ids for each in fresh.samples(IDS, 3, **given)} == {made.greedy("style", STEPS)}
    scored = fresh.prompt_logprobs(IDS, adapter="style")
    logits = made.logits("style").astype(np.float64)
    wanted = logits[-2, IDS[-1]] - np.log(np.exp(logits[-2]).sum())
    assert scored[-1] is not None
    assert abs(scored[-1].logprob - wanted) < 1e-5


def test_an_unknown_name_is_refused_with_those_there_are(fresh: Generator, tiny_bundle: Path) -> None:
    for ask in (fresh.generate, fresh.prompt_logprobs):
        with pytest.raises(PromptError, match=r"--adapter other.*style, facts"):
            ask(IDS, adapter="other")
    with pytest.raises(PromptError, match=r"--adapter style.*none"):
        Generator.open(tiny_bundle, threads=1).generate([1, 2], 1, adapter="style")


def test_a_saved_state_belongs_to_its_adapter(made: Adapted, fresh: Generator, tmp_path: Path) -> None:
    wanted = tokens(fresh, "style")
    fresh.save_state(tmp_path / "style.state", IDS, adapter="style")
    tokens(fresh, None)
    fresh.save_state(tmp_path / "base.state", IDS)
    other = Generator.open(made.folder, threads=1)
    for adapter in (None, "facts"):
        with pytest.raises(PromptError, match=r"style\.state: was saved with adapter style.*--adapter style"):
            other.load_state(tmp_path / "style.state", adapter=adapter)
    with pytest.raises(PromptError, match=r"base\.state: was saved with no adapter.*leave --adapter out"):
        other.load_state(tmp_path / "base.state", adapter="facts")
    assert other.prefix_cache.positions == 0
    other.load_state(tmp_path / "style.state", adapter="style")
    again = other.generate(IDS, STEPS, adapter="style")
    assert (again.token_ids, again.reused_tokens) == (wanted, len(IDS) - 2)
    assert other.generate(IDS, STEPS).reused_tokens == 0


def test_commands_take_an_adapter(made: Adapted, satchel: Satchel, tmp_path: Path) -> None:
    words = ("run", made.folder, PROMPT, "--threads", 1, "-n", STEPS, "--raw")
    found = [satchel.json(*words, *flags)["token_ids"] for flags in ((), ("--adapter", "style"))]
    ids = Generator.open(made.folder, threads=1).encode(PROMPT).tolist()
    assert [tuple(each) for each in found] == [made.greedy(adapter, STEPS, ids) for adapter in (None, "style")]
    assert "style, facts" in satchel.refuses(*words, "--adapter", "other", "--quiet")
    satchel(*words, "--adapter", "style", "--save-state", tmp_path / "saved")
    assert "--adapter style" in satchel.refuses(*words, "--load-state", tmp_path / "saved", "--quiet")
    measured = satchel.json("bench", made.folder, "-p", 20, "-n", 2, "--batch", 2, "--threads", 1, "--adapter", "facts")
    assert measured["decode"] > 0
    assert "other" in satchel.refuses("bench", made.folder, "-p", 20, "-n", 2, "--adapter", "other", "--quiet")


def test_a_conversation_keeps_its_adapter(made: Adapted, fresh: Generator, satchel: Satchel, tmp_path: Path) -> None:
    options = GenerationOptions(max_new_tokens=STEPS, adapter="style")
    talk = Conversation(fresh, options=options)
    for text in ("the cat", "sat"):
        answer = talk.ask(text).result()
        ids = fresh.encode_chat(talk.messages[:-1]).tolist()
        assert answer.token_ids == made.greedy("style", STEPS, ids)
    talk.save_state(tmp_path / "talk")
    with pytest.raises(PromptError, match=r"adapter style.*--adapter style"):
        Conversation(fresh, options=GenerationOptions(max_new_tokens=STEPS)).load_state(tmp_path / "talk")
    other = Conversation(fresh, options=options)
    other.load_state(tmp_path / "talk")
    assert other.messages == talk.messages
    words = ("chat", made.folder, "the cat", "--threads", 1, "-n", STEPS, "--temperature", 0)
    texts = [satchel.json(*words, *flags)["text"] for flags in ((), ("--adapter", "style"))]
    assert texts[1] == talk.messages[1]["content"] != texts[0]


def test_lines_of_a_file_have_adapters_of_their_own(
    made: Adapted, fresh: Generator, satchel: Satchel, tmp_path: Path
) -> None:
    work = Work(satchel, made.folder, tmp_path)
    named = [{}, {"adapter": "style"}, {"adapter": ""}, {"adapter": "other"}, {"adapter": 3}]
    work.write(*({"id": str(index), "prompt": PROMPT, **keys} for index, keys in enumerate(named)))
    work.run("--raw", "--adapter", "facts", "-n", STEPS, code=1)
    rows = by_id(work.rows())
    texts = [fresh.generate(PROMPT, STEPS, adapter=adapter).text for adapter in ("facts", "style", None)]
    assert len(set(texts)) == 3
    assert [rows[str(index)]["text"] for index in range(3)] == texts
    assert "style, facts" in rows["3"]["error"]
    assert "adapter" in rows["4"]["error"]


def test_eval_measures_an_adapter(made: Adapted, satchel: Satchel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the cat. " * 4)
    words = ("eval", made.folder, "--text", text, "--windows", 1, "--window-tokens", 24, "--skip", 2, "--threads", 1)
    base, style = (satchel.json(*words, *flags) for flags in ((), ("--adapter", "style")))
    ids = text_ids(Generator.open(made.folder, threads=1).need_tokenizer(), text.read_text())[:24]
    logits = made.logits("style", ids).astype(np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - np.append(logits[np.arange(23), ids[1:]], 0)
    assert style["prefill"]["perplexity"] == pytest.approx(np.exp(losses[2:-1].mean()), rel=1e-4)
    assert base["prefill"]["perplexity"] != pytest.approx(style["prefill"]["perplexity"], rel=1e-3)
    against = satchel.json(*words, "--adapter", "style", "--reference", made.folder)
    assert against["prefill"]["kl_mean"] < 1e-9
    assert against["decode"]["kl_mean"] < 1e-9


def test_inspect_lists_adapters(made: Adapted, satchel: Satchel) -> None:
    found = satchel.json("inspect", made.folder)["adapters"]
    assert [(each["name"], each["file"]) for each in found] == [(name, f"{name}.onnx_adapter") for name in ADAPTERS]
    out = satchel("inspect", made.folder).out
    assert "style: rank 4 on 8 layers" in out
    assert "facts: rank 3 on 8 layers" in out


def test_a_packed_bundle_has_its_adapters(made: Adapted, tmp_path: Path) -> None:
    pack(open_bundle(made.folder), tmp_path / "model.pyz")
    packed = Generator.open(tmp_path / "model.pyz", threads=1)
    assert [tokens(packed, adapter) for adapter in ALL] == [made.greedy(adapter, STEPS) for adapter in ALL]


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_onnxruntime_genai_takes_the_same_adapters(
    precision: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """In bundles with one graph for both phases; its pipelines ignore adapters."""
    folder = adapted(precision, tmp_path_factory).folder
    engine = Generator.open(folder, threads=1).engine
    for adapter in ALL:
        ((expected, logits),) = by_satchel(engine, [IDS], STEPS, adapter)
        ((found, others),) = by_genai(folder, [IDS], STEPS, tmp_path, adapter or "")
        assert found == expected
        assert np.abs(others - logits).max() <= 1e-5 * np.abs(logits).max()


DAMAGES: dict[str, Any] = {
    "other tensors": lambda folder: shutil.copy(folder / "facts.onnx_adapter", folder / "style.onnx_adapter"),
    "no adapter": lambda folder: (folder / "style.onnx_adapter").write_bytes(b"adapter" * 99),
    "cut": lambda folder: (folder / "style.onnx_adapter").write_bytes(
        (folder / "style.onnx_adapter").read_bytes()[:-4000]
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_of_an_adapter_is_refused(case: str, made: Adapted, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(made.folder, folder)
    generator = Generator.open(folder, threads=1)
    DAMAGES[case](folder)
    with pytest.raises(BundleError, match=r"style\.onnx_adapter"):
        generator.generate(IDS, 1, adapter="style")
    assert generator.generate(IDS, 1, adapter="facts").token_ids == made.greedy("facts", 1)


@pytest.mark.parametrize(("key", "value"), [("name", "somewhere.else"), ("shape", [65, 4])])
def test_graphs_and_manifest_have_the_same_adapters(key: str, value: object, made: Adapted, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(made.folder, folder)
    manifest = read_manifest(folder)
    manifest["adapters"][0]["inputs"][0][key] = value
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": manifest_digest(manifest)}))
    with pytest.raises(BundleError, match=r"prefill\.onnx"):
        Generator.open(folder, threads=1)
