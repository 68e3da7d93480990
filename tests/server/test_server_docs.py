"""The page on the server: its examples run, and it names every key of a request and every path."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.served import Served

from satchel.runtime.server import anthropic, chat, completions, embeddings, response_items
from satchel.runtime.server.app import GETS, POSTS
from satchel.runtime.server.options import OWN

PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8080"


def block(language: str, place: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[place]


def test_the_python_example_prints_an_answer(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("python").replace(ADDRESS, served.url), {})
    messages = [{"role": "user", "content": "What is the capital of Italy?"}]
    ids = served.generator.encode_chat(messages)
    assert capsys.readouterr().out == served.generator.generate(ids, max_new_tokens=32).text != ""


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_example_gets_an_answer(served: Served) -> None:
    command = block("sh").replace(ADDRESS, served.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert '"chat.completion"' in done.stdout


def test_every_key_and_path_is_named() -> None:
    named = set(re.findall(r"`([^`\s]+)`", PAGE))
    options = set(OWN) - {"temperature", "top_p"}  # one row refers to the page of options
    keys = (
        {key for module in (chat, completions, anthropic, response_items, embeddings) for key in module.TABLE}
        - options
        - {"messages", "prompt"}
    )
    assert keys - named == set()
    paths = {path.replace("{name:path}", "NAME") for path in (*POSTS, *GETS)}
    assert {path for path in paths if f" {path}`" not in PAGE} == set()
