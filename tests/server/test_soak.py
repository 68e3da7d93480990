"""2,000 requests from 16 connections, some of which vanish, cancel or send rubbish."""

from __future__ import annotations

import gc
import json
import random
import socket
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from support.memory import anonymous_mib
from support.served import Served, serving

from satchel.runtime.generation.sequence import ActiveSequence
from satchel.runtime.server.answers import Answers
from satchel.runtime.util.memory import release_freed

CONNECTIONS = 16
TEXT, CHAT, MESSAGES, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses"
WORDS = ["red", "green", "blue", "one", "two", "three", "sun", "moon"]
KINDS = {"whole": 6, "stream": 4, "vanish": 3, "cancel": 2, "rubbish": 2}
RUBBISH = [
    b"{",
    b"[]",
    b"\xff",
    b'{"prompt": 1}',
    b'{"prompt": "a", "max_tokens": -1}',
    b'{"prompt": "a", "model": "b"}',
]


def body_of(path: str, text: str, tokens: int) -> dict[str, Any]:
    """A request of a protocol for so many tokens after a text."""
    talk = [{"role": "user", "content": text}]
    return {
        TEXT: {"prompt": text, "max_tokens": tokens},
        CHAT: {"messages": talk, "max_tokens": tokens},
        MESSAGES: {"messages": talk, "max_tokens": tokens},
        RESPONSES: {"input": text, "max_output_tokens": tokens},
    }[path]


def text_in(document: dict[str, Any]) -> str:
    """The text in an answer, or in an event of a stream."""
    if "choices" in document:
        choice = document["choices"][0]
        return str(choice.get("text") or choice.get("delta", choice.get("message", {})).get("content") or "")
    if "output" in document:
        return "".join(part["text"] for item in document["output"] for part in item["content"])
    if document.get("type") == "response.output_text.delta":
        return str(document["delta"])
    if document.get("type") == "content_block_delta":
        return str(document["delta"]["text"])
    return "".join(block["text"] for block in document["content"]) if document.get("type") == "message" else ""


class Client:
    """One connection: it does its jobs one after another, and counts what came of them."""

    def __init__(self, served: Served, alone: dict[tuple[str, str, int], str], seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self._served, self._alone, self._rng = served, alone, random.Random(seed)

    def work(self, jobs: int) -> Counter[str]:
        """Send so many requests. Raises AssertionError for an answer that is not that of its prompt alone."""
        keys = list(self._alone)
        with httpx2.Client(base_url=self._served.url, timeout=120) as client:
            for _ in range(jobs):
                (kind,) = self._rng.choices(list(KINDS), list(KINDS.values()))
                path, text, tokens = key = self._rng.choice(keys)
                found = getattr(self, kind)(client, path, body_of(path, text, tokens))
                assert found in (None, self._alone[key]), key
                self.counts[kind] += 1
        return self.counts

    def whole(self, client: httpx2.Client, path: str, body: dict[str, Any]) -> str:
        answer = client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return text_in(answer.json())

    def stream(self, client: httpx2.Client, path: str, body: dict[str, Any], events: int | None = None) -> str | None:
        """The text of a stream; None if it is left after some events."""
        text = ""
        with client.stream("POST", path, json=body | {"stream": True}) as response:
            for place, line in enumerate(response.iter_lines()):
                if place == events:
                    return None
                if line.startswith("data: {"):
                    text += text_in(json.loads(line[6:]))
        return text if events is None else None  # it ended before

    def vanish(self, client: httpx2.Client, path: str, body: dict[str, Any]) -> None:
        self.stream(client, path, body, events=self._rng.randint(0, 9))

    def cancel(self, client: httpx2.Client, path: str, body: dict[str, Any]) -> None:
        """Close a connection at once after a request, or within one."""
        content = json.dumps(body | {"stream": self._rng.random() < 0.5}).encode()
        sent = content if self._rng.random() < 0.7 else content[:10]
        with socket.create_connection(("127.0.0.1", int(self._served.url.rsplit(":", 1)[1]))) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + sent)

    def rubbish(self, client: httpx2.Client, path: str, body: dict[str, Any]) -> None:
        if self._rng.random() < 0.2:
            with socket.create_connection(("127.0.0.1", int(self._served.url.rsplit(":", 1)[1]))) as connection:
                connection.sendall(self._rng.randbytes(50) + b"\r\n\r\n")
        else:
            assert client.post(path, content=self._rng.choice(RUBBISH)).status_code in (400, 404)


def soak(served: Served, alone: dict[tuple[str, str, int], str], requests: int) -> Counter[str]:
    """Send requests over all connections at once; returns the number of each kind that came to its end."""
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        clients = [Client(served, alone, seed) for seed in range(CONNECTIONS)]
        counts = sum(pool.map(lambda client: client.work(requests // CONNECTIONS), clients), Counter[str]())
    served.wait_until_idle()
    return counts


def memory() -> float:
    """MiB of this process that are in use."""
    gc.collect()
    release_freed()
    return anonymous_mib()


@pytest.mark.slow
def test_a_soak_loses_mixes_up_and_leaves_nothing(bundle: Path) -> None:
    rng = random.Random(0)
    with serving(bundle, rows=4, queue=64) as served:
        generator = served.generator
        alone: dict[tuple[str, str, int], str] = {}
        for number in range(64):
            common = "A story that begins like many others. " if number % 2 else ""
            text = common + " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
            path, tokens = (TEXT, CHAT, MESSAGES, RESPONSES)[number // 2 % 4], rng.randint(1, 40)
            prompt = text if path == TEXT else generator.encode_chat([{"role": "user", "content": text}])
            alone[path, text, tokens] = generator.generate(prompt, max_new_tokens=tokens).text
        soak(served, alone, 320)  # caches and pools are full then
        before = memory()
        counts = soak(served, alone, 2000)
        grown = memory() - before
        left = Counter(type(each).__name__ for each in gc.get_objects() if type(each) in (Answers, ActiveSequence))
        model = next(iter(served.state.models.loaded.values()))
        assert counts.total() == 2000
        assert min(counts[kind] for kind in KINDS) > 100
        assert (model.users, model.alive, served.get("/health").status_code) == (0, True, 200)
        assert grown < 8
        assert left.total() <= 2, left
        for path, text, tokens in list(alone)[:4]:
            assert served.post(path, body_of(path, text, tokens)).status_code == 200
