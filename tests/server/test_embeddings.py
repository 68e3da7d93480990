"""/v1/embeddings with OpenAI's client: the vectors of the generator, in both encodings, and what is refused."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from support.served import PATIENCE, Served, serving
from support.tiny_bundle import HIDDEN, MAX_CONTEXT, write_bundle

PATH = "/v1/embeddings"
TEXTS = ["the cat sat on the mat", "a", "looked at the other cat."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("embeddings") / "vectors", embeddings="mean")


@pytest.fixture(scope="module")
def embedding(folder: Path) -> Iterator[Served]:
    with serving(folder) as served:
        yield served


@pytest.fixture
def asking(embedding: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{embedding.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_vectors_are_those_of_the_generator_in_order(embedding: Served, asking: openai.OpenAI) -> None:
    expected = embedding.generator.embed(TEXTS)
    ids = [embedding.generator.encode(each).tolist() for each in TEXTS]
    for given in (TEXTS, ids):
        for more in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}, {"dimensions": HIDDEN}):
            answer = asking.embeddings.create(model="vectors", input=given, **more)
            assert [each.index for each in answer.data] == [0, 1, 2]
            vectors = [each.embedding for each in answer.data]
            if more.get("encoding_format") == "base64":
                vectors = [np.frombuffer(base64.b64decode(each), "<f4") for each in vectors]
            np.testing.assert_array_equal(np.asarray(vectors, np.float32), expected)
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
    for one in (TEXTS[1], ids[1]):
        (answer,) = asking.embeddings.create(model="vectors", input=one).data
        np.testing.assert_array_equal(np.asarray(answer.embedding, np.float32), expected[1])


def test_many_ask_at_once_while_texts_are_written(embedding: Served) -> None:
    expected = embedding.generator.embed(TEXTS)
    text = embedding.generator.generate(TEXTS[0], max_new_tokens=30).text

    def ask(number: int) -> Any:
        if number % 2:
            body = {"prompt": TEXTS[0], "max_tokens": 30}
            return embedding.post("/v1/completions", body).json()["choices"][0]["text"] == text
        found = embedding.post(PATH, {"input": TEXTS[number % 3]}).json()["data"][0]["embedding"]
        return np.array_equal(np.asarray(found, np.float32), expected[number % 3])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(24)))


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a", 5]}, "input"),
        ({"input": [[1, -1]]}, "input"),
        ({"input": [10**9]}, "input"),
        ({"input": ["a"] * 3000}, "input"),
        ({"input": "a b " * MAX_CONTEXT}, "input"),
        ({"dimensions": HIDDEN - 1}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"adapter": "none"}, "adapter"),
        ({"no_such": 1}, "no_such"),
    ],
)
def test_wrong_requests_are_refused(embedding: Served, change: dict[str, Any], param: str) -> None:
    assert embedding.refuses(PATH, {"input": "a"} | change)["param"] == param


def test_a_bundle_without_the_graph_is_refused(served: Served) -> None:
    assert served.refuses(PATH, {"input": "a"})["code"] == "embeddings_not_supported"


def test_limits_hold_and_tokens_are_counted(folder: Path) -> None:
    with serving(folder, timeout=1e-9) as served:
        assert served.refuses(PATH, {"input": "a"}, 504)["code"] == "timeout"
    with serving(folder, queue=0) as served:
        count = served.post(PATH, {"input": TEXTS}).json()["usage"]["prompt_tokens"]
        assert f"satchel_embedded_tokens_total {count}\n" in served.get("/metrics").text
        embed, go, begun = served.generator.embed, threading.Event(), threading.Event()

        def slow(*given: Any, **more: Any) -> Any:
            begun.set()
            go.wait(PATIENCE)
            return embed(*given, **more)

        served.generator.embed = slow  # type: ignore[method-assign]
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(served.post, PATH, {"input": "a"})
            assert begun.wait(PATIENCE)
            assert served.refuses(PATH, {"input": "a"}, 429)["code"] == "queue_full"
            go.set()
            assert first.result().status_code == 200
        assert served.post(PATH, {"input": "a"}).status_code == 200
