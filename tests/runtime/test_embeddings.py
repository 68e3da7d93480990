"""Embeddings of the runner are as the logits of the same bundle say; the command, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.command import Satchel
from support.packed import run_packed
from support.tiny_bundle import HIDDEN, MAX_CONTEXT, change_manifest, make_weights, read_manifest, write_bundle

from satchel.runtime.errors import BundleError, PromptError
from satchel.runtime.generation.generator import Generator
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.tools.pack import pack

TEXTS = ["the cat sat on the mat", "a", "looked at the other cat. " * 4]


def head() -> NDArray[np.float32]:
    """[hidden, vocabulary]"""
    weights = make_weights()
    tensor = next(tensor for tensor in weights.tensors if tensor.name == "head")
    place = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    content = bytes(weights.content)[place["offset"] : place["offset"] + place["length"]]
    return np.frombuffer(content, np.float32).reshape(tuple(tensor.dims))


@pytest.fixture(scope="module", params=["mean", "last"])
def pooling(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(pooling: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("embeddings") / pooling, embeddings=pooling)


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    return Generator.open(folder, threads=1)


def expected(generator: Generator, text: str, pooling: str) -> NDArray[np.float32]:
    """The vector times the head: the head is linear, so it is that of the pooled logits."""
    logits = generator.engine.score(generator.encode(text))
    return logits[-1] if pooling == "last" else logits.mean(axis=0)


def test_texts_of_any_length_are_pooled(generator: Generator, pooling: str) -> None:
    found = generator.embed(TEXTS, normalize=False)
    assert (found.dtype, found.shape) == (np.float32, (len(TEXTS), HIDDEN))
    for vector, text in zip(found, TEXTS, strict=True):
        wanted = expected(generator, text, pooling)
        assert np.abs(vector @ head() - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_a_long_text_is_fed_in_pieces(generator: Generator) -> None:
    ids = np.random.default_rng(1).integers(3, 300, MAX_CONTEXT)
    whole = generator.engine.embed(ids)
    for chunk in (2, 7, MAX_CONTEXT):
        found = generator.engine.embed(ids, chunk)
        assert np.abs(found - whole).max() <= 1e-5 * np.abs(whole).max()


def test_vectors_have_length_one_unless_asked_for_as_they_are(generator: Generator) -> None:
    plain, found = generator.embed(TEXTS, normalize=False), generator.embed(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(found, plain / np.linalg.norm(plain, axis=1)[:, None], rtol=1e-6)
    assert (np.abs(np.linalg.norm(plain, axis=1) - 1) > 0.5).all()


def test_what_cannot_be_embedded_is_refused(generator: Generator, chatty: Path) -> None:
    with pytest.raises(PromptError, match=str(MAX_CONTEXT)):
        generator.embed([np.arange(MAX_CONTEXT + 1)])
    with pytest.raises(PromptError, match="outside the vocabulary"):
        generator.embed([[100_000]])
    assert generator.embed([]).shape == (0, HIDDEN)
    with pytest.raises(BundleError, match="--embeddings"):
        Generator.open(chatty, threads=1).embed(["a"])


def test_the_command_prints_a_line_for_each_text(satchel: Satchel, folder: Path, generator: Generator) -> None:
    row = json.loads(satchel("embed", folder, TEXTS[0], "--quiet").out)
    assert row.keys() == {"id", "embedding", "prompt_tokens"}
    assert np.array_equal(np.float32(row["embedding"]), generator.embed(TEXTS[:1])[0])
    assert json.loads(satchel("embed", folder, stdin=TEXTS[0] + "\n").out) == row
    plain = json.loads(satchel("embed", folder, TEXTS[0], "--no-normalize").out)
    assert np.array_equal(np.float32(plain["embedding"]), generator.embed(TEXTS[:1], normalize=False)[0])


def test_a_packed_bundle_gives_the_same_vectors(satchel: Satchel, folder: Path, tmp_path: Path) -> None:
    expected = satchel("embed", folder, TEXTS[0], "--quiet").out
    pack(open_bundle(folder), tmp_path / "model.pyz")
    assert satchel("embed", tmp_path / "model.pyz", TEXTS[0], "--quiet").out == expected
    assert run_packed(tmp_path / "model.pyz", "embed", TEXTS[0]).stdout == expected


def test_the_command_reads_lines_and_names_wrong_ones(
    satchel: Satchel, folder: Path, generator: Generator, tmp_path: Path
) -> None:
    lines: list[Any] = [{"id": "x", "prompt": TEXTS[0]}, {"prompt": 7}, {"prompt": "a", "temperature": 1}]
    lines += [{"messages": [{"role": "user", "content": "a"}]}, [], {"prompt": TEXTS[2]}, {"prompt": "b " * 500}]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    said = satchel("embed", folder, "--input", source, "-o", target, code=1)
    assert (said.out, "5 of 7" in said.err) == ("", True)
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["x", 2, 3, 4, 5, 6, 7]
    assert [row["error"].split(":")[0] for row in rows if "error" in row] == [f"line {n}" for n in (2, 3, 4, 5, 7)]
    found = np.float32([rows[0]["embedding"], rows[5]["embedding"]])
    assert np.array_equal(found, generator.embed([TEXTS[0], TEXTS[2]]))
    printed = satchel("embed", folder, "--input", "-", stdin=source.read_bytes(), code=1).out
    assert printed == target.read_text()


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["TEXT", "--input", "-"], "--input"),
        (["--input", "/nowhere/in.jsonl"], "/nowhere/in.jsonl"),
        (["TEXT", "-o", "/nowhere/out.jsonl"], "/nowhere"),
        (["TEXT", "--adapter", "style"], "style"),
    ],
)
def test_the_command_refuses(satchel: Satchel, folder: Path, words: list[str], fact: str) -> None:
    assert fact in satchel.refuses("embed", folder, *words, "--quiet")


def test_the_command_says_how_to_get_embeddings(satchel: Satchel, chatty: Path) -> None:
    assert "--embeddings" in satchel.refuses("embed", chatty, "a", "--quiet")


def test_inspect_shows_the_graph(satchel: Satchel, folder: Path, pooling: str) -> None:
    facts = satchel.json("inspect", folder)
    assert "embed" in facts["graphs"]
    assert (facts["embeddings"], facts["embedding_size"]) == (pooling, HIDDEN)
    assert f"{pooling}, {HIDDEN} numbers" in satchel("inspect", folder).out


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda entry: entry.update(pooling="sum"), "embeddings.pooling"),
        (lambda entry: entry.update(size=0), "embeddings.size"),
        (lambda entry: entry.update(size=1 << 21), "embeddings.size"),
        (lambda entry: entry.update(size=HIDDEN + 1), "embeddings.graph.outputs"),
        (lambda entry: entry["graph"]["outputs"].pop(0), "embeddings.graph.outputs"),
        (lambda entry: entry["graph"]["inputs"].pop(0), "embeddings.graph.inputs"),
        (lambda entry: entry["graph"].update(file="other.onnx"), "embeddings.graph.file"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, change: Callable[[Any], object], key: str) -> None:
    folder = write_bundle(tmp_path / "bundle", embeddings="mean")
    entry = read_manifest(folder)["embeddings"]
    change(entry)
    change_manifest(folder, "embeddings", to=entry)
    with pytest.raises(BundleError, match=key.replace(".", r"\.")):
        Generator.open(folder, threads=1)
