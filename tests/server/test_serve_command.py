"""`satchel serve` refuses in one line what it cannot serve, and takes its settings from flags and the environment."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from support.command import Satchel

from satchel.runtime.server import run
from satchel.runtime.server.state import State


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--batch", "0"], "--batch"),
        (["--queue", "-1"], "--queue"),
        (["--port", "70000"], "--port"),
        (["--port", "-1"], "--port"),
        (["--timeout", "0"], "--timeout"),
        (["--timeout", "nan"], "--timeout"),
        (["--max-body", "-1"], "--max-body"),
        (["--max-body", "inf"], "--max-body"),
        (["--memory-limit", "0"], "--memory-limit"),
        (["--max-context", "0"], "context"),
        (["--host", "192.0.2.1"], "--host"),
    ],
)
def test_wrong_flags_are_refused(satchel: Satchel, bundle: Path, flags: list[str], named: str) -> None:
    assert named in satchel.refuses("serve", bundle, "--port", "0", "--no-specialize", *flags)


def test_bundles_that_cannot_be_served_are_refused(satchel: Satchel, bundle: Path, tmp_path: Path) -> None:
    assert "NAME=" in satchel.refuses("serve", bundle, bundle)
    assert "=" in satchel.refuses("serve", f"={bundle}")
    assert "missing" in satchel.refuses("serve", tmp_path / "missing", "--port", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert port in satchel.refuses("serve", bundle, "--port", port)
    assert "--memory-limit" in satchel.refuses("serve", bundle, "--port", "0", "--memory-limit", "1", "--batch", "9999")


def test_flags_and_the_environment_become_settings(
    satchel: Satchel, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[State, str, list[str]]] = []

    def make_server(state: State, host: str) -> Any:
        seen.append((state, host, list(state.models.loaded)))
        return type("Server", (), {"run": lambda self, listeners: None})()

    monkeypatch.setattr(run, "make_server", make_server)
    monkeypatch.setenv("SATCHEL_API_KEY", "secret")
    flags = [
        "--batch",
        "3",
        "--queue",
        "5",
        "--max-body",
        "0.5",
        "--timeout",
        "9",
        "--cors-origin",
        "http://a",
        "--quiet",
    ]
    satchel("serve", f"a={bundle}", f"b={bundle}", "--port", "0", "--no-specialize", *flags)
    ((state, host, loaded),) = seen
    settings = state.settings
    assert (settings.rows, settings.queue, settings.max_body, settings.timeout) == (3, 5, 1 << 19, 9)
    assert (settings.api_key, settings.cors_origins, settings.quiet) == ("secret", ("http://a",), True)
    assert (host, loaded, list(state.models.paths)) == ("127.0.0.1", ["a"], ["a", "b"])
