"""The page to chat with is one file that loads nothing, and its script is JavaScript."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.served import Served


def test_the_page_is_one_file_without_an_outside_address(served: Served) -> None:
    answer = served.get("/")
    assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, "text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(|innerHTML", answer.text)
    asked = re.findall(r'fetch\("([^"]+)"', answer.text)
    assert asked == ["v1/models", "v1/chat/completions"]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_javascript(served: Served, tmp_path: Path) -> None:
    script = re.search(r"<script>(.*)</script>", served.get("/").text, re.DOTALL)
    assert script
    (tmp_path / "page.js").write_text(script[1], encoding="utf-8")
    done = subprocess.run(["node", "--check", tmp_path / "page.js"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
