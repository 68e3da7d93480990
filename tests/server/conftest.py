"""One server over a tiny bundle for all tests that only ask it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from support.chat_bundle import END, write_chat_bundle
from support.served import Served, serving

from satchel.runtime.generation.request import Request

NAME = "chatty"


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_bundle(tmp_path_factory.mktemp("bundles") / NAME)


@pytest.fixture(scope="session")
def served(bundle: Path) -> Iterator[Served]:
    with serving(bundle) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def claude(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def says(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """A list whose first item is what the model says to each request; prompts are added to it."""
    model, said = next(iter(served.state.models.loaded.values())), [""]

    def scripted(request: Request) -> Any:
        ids = iter([*model.tokenizer.encode_rendered(said[0]), END])
        said.append(model.tokenizer.decode(request.prompt))
        return model.generator.new_sequence(request, choose=lambda logits: next(ids))

    monkeypatch.setattr(model.scheduler, "_new_sequence", scripted)
    yield said
