"""The server itself: health, counts, the log, clients that vanish, signals, and many requests at once."""

from __future__ import annotations

import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from support.chat_bundle import CONTEXT
from support.served import PATIENCE, Served, serving

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
ENDLESS = {"prompt": "a", "max_tokens": CONTEXT, "logit_bias": {"346": -1e9, "1": -1e9, "2": -1e9}}


def test_health_and_texts(served: Served) -> None:
    assert served.get("/health").json() == {"status": "ok"}
    tokens = served.post("/tokenize", {"content": "Hello there"}).json()["tokens"]
    assert tokens == served.generator.tokenizer.encode("Hello there")
    assert served.post("/detokenize", {"tokens": tokens}).json() == {"content": "Hello there"}
    plain = served.post("/tokenize", {"content": "Hello", "add_special": False}).json()["tokens"]
    assert plain == served.generator.tokenizer.encode_rendered("Hello")
    prompt = served.post("/apply-template", {"messages": [{"role": "developer", "content": "x"}, *HELLO]}).json()[
        "prompt"
    ]
    messages = [{"role": "system", "content": "x"}, *HELLO]
    assert prompt == served.generator.template.render(messages)


def test_metrics_count_tokens_and_requests(bundle: Path) -> None:
    with serving(bundle) as served:
        answer = served.post(TEXT, {"prompt": "Hello there", "max_tokens": 5}).json()
        again = served.post(TEXT, {"prompt": "Hello there", "max_tokens": 5}).json()
        served.post("/nonsense/path", {})
        served.post(TEXT, {"prompt": 5})
        page = served.get("/metrics").text
    lines = [line for line in page.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z_]+(\{[^{}]*\})? [0-9.e+-]+", line) for line in lines)
    values = dict(line.rsplit(" ", 1) for line in lines)
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    assert int(values["satchel_prompt_tokens_cached_total"]) == cached
    assert int(values["satchel_prompt_tokens_total"]) == 2 * answer["usage"]["prompt_tokens"] - cached
    assert int(values["satchel_tokens_predicted_total"]) == 10
    assert values['satchel_requests_total{path="/v1/completions",status="200"}'] == "2"
    assert values['satchel_requests_total{path="/v1/completions",status="400"}'] == "1"
    assert values['satchel_requests_total{path="other",status="404"}'] == "1"
    assert values['satchel_requests_processing{model="chatty"}'] == "0"
    assert float(values["satchel_prompt_seconds_total"]) > 0


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_has_a_line_per_request_and_prompts_only_if_asked(
    bundle: Path, capsys: pytest.CaptureFixture[str], log_prompts: bool
) -> None:
    with serving(bundle, quiet=False, log_prompts=log_prompts) as served:
        served.post(TEXT, {"prompt": "sesame\nforged line", "max_tokens": 2})
        served.post("/no%0Aforged", {})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("POST /v1/completions 200, model chatty, prompt ")
    assert ("sesame" in lines[0]) == log_prompts
    assert "404" in lines[1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_frees_its_row(bundle: Path, stream: bool) -> None:
    with serving(bundle, rows=1) as served:
        scheduler = next(iter(served.state.models.loaded.values())).scheduler
        cancelled = threading.Event()
        cancel = scheduler.cancel
        scheduler.cancel = lambda id: (cancelled.set(), cancel(id))[1]  # type: ignore[method-assign]
        slow = scheduler.step
        scheduler.step = lambda: (time.sleep(0.005), slow())[1]  # type: ignore[method-assign]
        connection = socket.create_connection(("127.0.0.1", int(served.url.rsplit(":", 1)[1])))
        body = json.dumps(ENDLESS | {"stream": stream}).encode()
        head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection.sendall(head + body)
        end = time.monotonic() + PATIENCE
        while not scheduler.running:
            assert time.monotonic() < end
            time.sleep(0.001)
        connection.close()
        assert cancelled.wait(PATIENCE)
        served.wait_until_idle()
        assert served.post(TEXT, {"prompt": "b", "max_tokens": 1}).status_code == 200
        page = served.get("/metrics").text
        assert f'status="{200 if stream else 499}"' in page


def test_requests_are_answered_before_the_server_ends(bundle: Path) -> None:
    with serving(bundle) as served, ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(served.post, TEXT, {"prompt": f"p{k}", "max_tokens": 60}) for k in range(4)]
        scheduler = next(iter(served.state.models.loaded.values())).scheduler
        while not scheduler.running and not all(each.done() for each in asked):
            time.sleep(0.001)
    assert all(each.result().status_code == 200 for each in asked[:1])


@pytest.mark.slow
def test_the_command_serves_until_a_signal_and_ends_well(bundle: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "satchel.runtime.cli.main", "serve", f"tiny={bundle}", "--port", "0", "-t", "1",
         "--no-specialize"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        url = process.stderr.readline().split()[-1]
        assert httpx2.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny"
        assert httpx2.post(f"{url}{TEXT}", json={"prompt": "a", "max_tokens": 3}).status_code == 200
        process.terminate()
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert "Traceback" not in said


@pytest.mark.slow
def test_many_clients_get_their_own_answers_whatever_others_do(bundle: Path) -> None:
    """200 requests over 16 connections, some vanish or are rubbish: each answer is that of its prompt alone."""
    rng = random.Random(0)
    words = ["red", "green", "blue", "one", "two", "three", "sun", "moon"]
    common = "A story that begins like many others. "
    jobs: list[tuple[str, dict[str, Any]]] = []
    for number in range(200):
        prompt = (common if rng.random() < 0.5 else "") + " ".join(rng.choices(words, k=rng.randint(1, 12)))
        kind = rng.choices(["whole", "stream", "vanish", "rubbish"], [5, 3, 2, 2])[0]
        jobs.append((kind, {"prompt": f"{prompt} {number % 50}", "max_tokens": rng.randint(1, 40)}))
    with serving(bundle, rows=4, queue=200) as served:
        alone = {
            (body["prompt"], body["max_tokens"]): served.generator.generate(body["prompt"], body["max_tokens"]).text
            for kind, body in jobs
            if kind in ("whole", "stream")
        }

        def work(client: httpx2.Client, kind: str, body: dict[str, Any]) -> str | None:
            if kind == "rubbish":
                wrong = rng.choice([b"{", b"[]", b'{"prompt": 1}', b'{"prompt": "a", "max_tokens": -1}'])
                assert client.post(served.url + TEXT, content=wrong).status_code == 400
                return None
            if kind == "whole":
                return str(client.post(served.url + TEXT, json=body).json()["choices"][0]["text"])
            text = ""
            with client.stream("POST", served.url + TEXT, json=body | {"stream": True}) as response:
                for place, line in enumerate(response.iter_lines()):
                    if kind == "vanish" and place > 2:
                        return None
                    if line.startswith("data: {"):
                        text += json.loads(line[6:])["choices"][0]["text"]
            return text if kind == "stream" else None

        def connection(own: list[tuple[str, dict[str, Any]]]) -> list[tuple[dict[str, Any], str]]:
            with httpx2.Client(timeout=60) as client:
                found = [(body, work(client, kind, body)) for kind, body in own]
            return [(body, text) for body, text in found if text is not None]

        with ThreadPoolExecutor(16) as pool:
            answers = [each for found in pool.map(connection, [jobs[k::16] for k in range(16)]) for each in found]
        assert len(answers) == sum(kind in ("whole", "stream") for kind, _ in jobs)
        for body, text in answers:
            assert text == alone[body["prompt"], body["max_tokens"]], body
        served.wait_until_idle()
