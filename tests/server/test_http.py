"""What HTTP asks of the server: methods, connections, ids of requests, keys, other origins, and an orderly end."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from support.chat_bundle import CONTEXT
from support.served import PATIENCE, Served, serving

from satchel.runtime.server import guard
from satchel.runtime.server.app import GETS, POSTS
from satchel.runtime.server.run import listen

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
SHORT = {"prompt": "Hello", "max_tokens": 2}
ENDLESS = {"prompt": "a", "max_tokens": CONTEXT, "max_repeats": 0, "logit_bias": {"346": -1e9, "1": -1e9, "2": -1e9}}


@pytest.mark.parametrize("path", sorted(GETS))
def test_what_can_be_got_has_a_head(served: Served, path: str) -> None:
    path = path.replace("{name:path}", "chatty")
    got, head = served.get(path), httpx2.head(served.url + path)
    assert (head.status_code, head.content) == (got.status_code, b"") == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


@pytest.mark.parametrize("path", sorted(POSTS))
def test_other_methods_are_refused_and_told_which_there_are(served: Served, path: str) -> None:
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        answer = httpx2.request(method, served.url + path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        assert answer.json()["error"]["message"]


def test_one_connection_takes_many_requests_also_after_errors(served: Served) -> None:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=PATIENCE)
    connection.connect()
    sock = connection.sock
    for body in (b"{", json.dumps(SHORT).encode(), json.dumps(SHORT | {"stream": True}).encode(), b'{"prompt": 5}'):
        connection.request("POST", TEXT, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == (400 if body in (b"{", b'{"prompt": 5}') else 200)
        answer.read()
        assert connection.sock is sock
    connection.close()


def test_each_request_has_an_id_in_its_answer_and_in_the_log(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(bundle, quiet=False) as served:
        own = served.post(TEXT, SHORT, headers={"X-Request-Id": "job-7.a"}).headers["x-request-id"]
        made = [served.post(TEXT, body).headers["x-request-id"] for body in (SHORT, {"prompt": 5})]
        forged = served.post(TEXT, SHORT, headers={"X-Request-Id": "a b, 200"}).headers["x-request-id"]
        theirs = served.post(MESSAGES, {}).headers["request-id"]
    assert own == "job-7.a"
    assert len({*made, forged, theirs}) == 4
    assert all(id.startswith("req_") for id in (*made, forged, theirs))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[-1] for line in lines] == [own, *made, forged, theirs]


def test_the_key_is_compared_in_constant_time_however_it_is_sent(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = guard.hmac.compare_digest
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda *pair: (compared.append(pair), compare(*pair))[1])
    with serving(bundle, api_key="schlüssel") as served:
        for headers, status in (
            ({"Authorization": "Bearer schlüssel".encode()}, 200),
            ({"authorization": "bearer  schlüssel".encode()}, 200),
            ({"x-api-key": "schlüssel".encode()}, 200),
            ({"Authorization": "Basic schlüssel".encode()}, 401),
            ({"Authorization": "schlüssel".encode()}, 401),
            ({"x-api-key": b"\xff"}, 401),
        ):
            answer = served.get("/v1/models", headers=headers)
            assert answer.status_code == status, headers
            assert ("www-authenticate" in answer.headers) == (status == 401)
        assert served.get("/").status_code == 200
    assert len(compared) == 6
    assert all(isinstance(part, bytes) for pair in compared for part in pair)


def test_a_page_of_a_named_origin_may_ask_first(bundle: Path) -> None:
    named = "http://localhost:3000"
    with serving(bundle, cors_origins=(named,), api_key="secret") as served:
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        allowed = httpx2.options(served.url + CHAT, headers={"Origin": named, **asks})
        assert allowed.status_code == 204
        assert allowed.headers["access-control-allow-origin"] == named
        assert "POST" in allowed.headers["access-control-allow-methods"]
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        assert allowed.headers["vary"] == "Origin"
        for origin in ("http://localhost:3001", "null", "http://localhost:3000.evil.example"):
            refused = httpx2.options(served.url + CHAT, headers={"Origin": origin, **asks})
            assert refused.status_code == 403
            assert "access-control-allow-origin" not in refused.headers
        wrong = served.post(CHAT, {}, headers={"Origin": named})
        assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (401, named)


@contextmanager
def command(bundle: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command that serves a bundle, and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "satchel.runtime.cli.main", "serve", f"tiny={bundle}", "--port", "0", "-t", "1",
         "--no-specialize", *flags],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "SATCHEL_API_KEY": ""},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        yield process, process.stderr.readline().split()[-1]
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_signal_lets_running_answers_end_and_takes_no_others(bundle: Path) -> None:
    with command(bundle) as (process, url):
        got: list[Any] = []

        def ask() -> None:
            with httpx2.stream("POST", url + TEXT, json=ENDLESS | {"stream": True}, timeout=PATIENCE) as response:
                for line in response.iter_lines():
                    got.append(line)

        asking = threading.Thread(target=ask)
        asking.start()
        end = time.monotonic() + PATIENCE
        while len(got) < 4:
            assert time.monotonic() < end
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        asking.join(PATIENCE)
        assert process.wait(PATIENCE) == 0
        assert got[-2] == "data: [DONE]"
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/health")


@pytest.mark.slow
def test_a_second_signal_does_not_wait(bundle: Path) -> None:
    asked = ENDLESS | {"n": 16, "stream": True}
    with (
        command(bundle) as (process, url),
        httpx2.stream("POST", url + TEXT, json=asked, timeout=PATIENCE) as response,
    ):
        next(response.iter_lines())
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 0


def test_small_events_are_sent_at_once() -> None:
    """Without TCP_NODELAY, each answer waits some 40 ms for the client's acknowledgment of what was sent before it."""

    async def option() -> int:
        told: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            told.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listener = listen("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection("127.0.0.1", listener.getsockname()[1])
            writer.close()
            return await asyncio.wait_for(told, PATIENCE)

    assert asyncio.run(option()) != 0
