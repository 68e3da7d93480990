"""Several models: loaded when they are asked for, and let go for others if memory is limited."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path

import pytest
from support.chat_bundle import write_chat_bundle
from support.served import PATIENCE, Served, serving

TEXT = "/v1/completions"
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("several")
    return {name: write_chat_bundle(place / name, seed=seed) for seed, name in enumerate(NAMES)}


def ask(served: Served, name: str, tokens: int = 3) -> str:
    answer = served.post(TEXT, {"model": name, "prompt": "Hello", "max_tokens": tokens})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == name
    return str(answer.json()["choices"][0]["text"])


def test_a_model_is_loaded_when_it_is_asked_for(bundles: dict[str, Path]) -> None:
    with serving(bundles) as served:
        assert list(served.state.models.loaded) == ["a"]
        assert [model["id"] for model in served.get("/v1/models").json()["data"]] == list(NAMES)
        assert ask(served, "a") != ask(served, "b")
        assert list(served.state.models.loaded) == ["a", "b"]


def test_the_model_that_was_not_used_the_longest_is_let_go(bundles: dict[str, Path]) -> None:
    with serving(bundles) as served:
        one = served.state.models.loaded["a"].nbytes
        texts = {name: ask(served, name) for name in NAMES}
    with serving(bundles, memory_limit=round(2.5 * one)) as served:
        for name, left in (("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc")):
            assert ask(served, name) == texts[name]
            assert sorted(served.state.models.loaded) == list(left)


def test_the_memory_of_a_model_is_free_at_once(bundles: dict[str, Path]) -> None:
    with serving(bundles) as served:
        one = served.state.models.loaded["a"].nbytes
    with serving(bundles, memory_limit=round(1.5 * one)) as served:
        for name, other in ("ab", "ba", "ab"):
            ask(served, name)
            engine = served.state.models.loaded[name].generator.engine
            engine.own = engine  # type: ignore[attr-defined]  # a cycle, as engines with blocks of keys and values are
            kept = weakref.ref(engine)
            del engine
            ask(served, other)
            assert kept() is None


def test_a_model_that_is_used_is_not_let_go(bundles: dict[str, Path]) -> None:
    with serving(bundles) as served:
        one = served.state.models.loaded["a"].nbytes
    with serving(bundles, memory_limit=round(1.5 * one)) as served:
        model = served.state.models.loaded["a"]
        step, go = model.scheduler.step, threading.Event()
        model.scheduler.step = lambda: go.wait(PATIENCE) and step()  # type: ignore[assignment, method-assign, return-value]
        asked = threading.Thread(target=ask, args=(served, "a"))
        asked.start()
        while not model.users:
            pass
        assert served.refuses(TEXT, {"model": "b", "prompt": "Hello"}, 503)["code"] == "out_of_memory"
        go.set()
        asked.join()
        ask(served, "b")
        assert list(served.state.models.loaded) == ["b"]


def test_a_model_beyond_the_limit_is_refused(bundles: dict[str, Path]) -> None:
    with serving(bundles) as served:
        object.__setattr__(served.state.settings, "memory_limit", 1000)
        assert "--memory-limit" in served.refuses(TEXT, {"model": "b", "prompt": "Hello"}, 500)["message"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_model_whose_step_failed_is_loaded_again(bundles: dict[str, Path]) -> None:
    def fail() -> None:
        raise RuntimeError("a step failed")

    with serving({"a": bundles["a"]}) as served:
        text = ask(served, "a")
        served.state.models.loaded["a"].scheduler.step = fail  # type: ignore[assignment, method-assign]
        served.refuses(TEXT, {"model": "a", "prompt": "Hello"}, 500)
        assert served.get("/health").status_code == 503
        assert ask(served, "a") == text
        assert served.get("/health").status_code == 200
