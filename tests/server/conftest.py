"""One server over a tiny bundle for all tests that only ask it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from support.chat_bundle import write_chat_bundle
from support.served import Served, serving

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
