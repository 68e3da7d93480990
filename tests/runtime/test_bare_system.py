"""The runner without what POSIX and Linux add to Python: modules, functions, signals and /proc (`support/bare`)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from support.command import Satchel

from satchel.runtime.bundle.reader import read_bundle
from satchel.runtime.util.child import python_path

BARE = Path(__file__).parents[1] / "support" / "bare"
PATIENCE = 120  # seconds

COMMANDS = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from satchel.runtime.cli.main import main

results = []
for words, stdin in json.load(sys.stdin):
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin.encode()))
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = main(words)
    results.append((code, out.getvalue(), err.getvalue()))
json.dump(results, sys.stdout)
"""


def environment(platform: str, home: Path) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items() if name != "CI"}
    path = os.pathsep.join((str(BARE), python_path()))
    return found | {"BARE_PLATFORM": platform, "PYTHONPATH": path, "XDG_CACHE_HOME": str(home)}


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_commands_do_their_work(satchel: Satchel, certified: Path, chatty: Path, tmp_path: Path, platform: str) -> None:
    """The same texts, digests and rows as with everything there; what is not known is said to be so."""
    state, rows, packed = tmp_path / "talk.state", tmp_path / "rows.jsonl", tmp_path / "packed.pyz"
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "the"}\n{"prompt": "cat", "max_new_tokens": 3}\n')
    threads = ("--threads", "1")
    run = ("run", certified, "the cat", "-n", 9, "--json", *threads)
    chat = ("chat", chatty, "--json", "-n", 5, *threads)
    requests = ("run", certified, "--input", lines, "--output", rows, *threads)
    work: dict[str, tuple[tuple[Any, ...], str]] = {
        "run": (run, ""),
        "chat": (chat, f"hello\n/save {state}\n"),
        "resumed": ((*chat, "--load-state", state), "and you?\n"),
        "answers": ((*requests, "-n", 4), ""),
        "stale": ((*requests, "-n", 5), ""),
        "again": ((*requests, "-n", 5), ""),
        "verify": (("verify", certified, *threads), ""),
        "inspect": (("inspect", certified, "--json"), ""),
        "pack": (("pack", certified, "-o", packed, "--json"), ""),
        "unpack": (("unpack", packed, "-o", tmp_path / "unpacked", "--json"), ""),
        "bench": (("bench", certified, "-p", 8, "-n", 2, "--no-bandwidth", *threads), ""),
        "profile": (("profile", certified, "-p", 4, "-n", 2, *threads), ""),
        "specialize": (("specialize", tmp_path / "unpacked", *threads), ""),
        "doctor": (("doctor", tmp_path / "unpacked", "--json"), ""),
        "report": (("doctor", certified, "--report", tmp_path / "report.json", *threads), ""),
    }
    given = json.dumps([([str(word) for word in words], stdin) for words, stdin in work.values()])
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMMANDS], input=given, capture_output=True, text=True, timeout=PATIENCE,
        env=environment(platform, tmp_path / "cache"), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {name: tuple(result) for name, result in zip(work, json.loads(done.stdout), strict=True)}
    assert {name: code for name, (code, _, _) in found.items() if code} == {}, found
    told = {name: out for name, (_, out, _) in found.items()}

    assert json.loads(told["run"])["token_ids"] == satchel.json(*run[:-3], *threads)["token_ids"]
    turns = [json.loads(line)["text"] for line in satchel(*chat, stdin="hello\nand you?\n").out.splitlines()]
    assert [json.loads(told[name])["text"] for name in ("chat", "resumed")] == turns
    assert [json.loads(line)["new_tokens"] for line in rows.read_text().splitlines()] == [3, 5]
    assert "1 answers" in found["stale"][2]
    assert "all 2 prompts are answered already" in found["again"][2]
    assert told["verify"].endswith("OK\n")
    digests = {json.loads(told[name])["digest"] for name in ("pack", "unpack")}
    assert digests == {read_bundle(certified).digest}
    assert json.loads(told["inspect"])["source"]["name"] == "tiny"
    assert re.search(r"memory +not reported on this system", told["bench"])
    machine = json.loads(told["doctor"])
    assert machine["speed"]["specialized"]
    assert machine["memory"] == {"total": None, "available": None}
    assert json.loads((tmp_path / "report.json").read_text())["works"]
    assert [path.name for path in tmp_path.glob(".satchel-*")] == []


def test_a_server_answers_and_ends(chatty: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "satchel.runtime.cli.main", "serve", str(chatty), "--port", "0"]
    with subprocess.Popen(
        [*command, "--threads", "1"], stderr=subprocess.PIPE, text=True, env=environment("linux", tmp_path)
    ) as server:
        assert server.stderr is not None
        address = next(line.split()[-1] for line in server.stderr if line.startswith("serving "))
        body = {"model": chatty.name, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        asked = urllib.request.Request(
            f"{address}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == 4
        server.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE) == 0


def test_what_is_taken_away_is_away(tmp_path: Path) -> None:
    """Otherwise the tests above would show nothing."""
    code = (
        "import os, select, signal, sys\n"
        "assert sys.platform == 'darwin' and not hasattr(os, 'fork') and not hasattr(signal, 'SIGALRM')\n"
        "assert not hasattr(select, 'poll') and not os.path.exists('/proc/cpuinfo')\n"
        "import fcntl"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment("darwin", tmp_path)
    )
    assert "ModuleNotFoundError: No module named 'fcntl'" in done.stderr
