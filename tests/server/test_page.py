"""The page to chat with is one file that loads nothing; in a browser it streams, stops, asks again and runs no answer.

The browser is the one of samples/web: `make test-web` installs it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.chat_bundle import END, write_chat_bundle
from support.node import answer, node
from support.served import Served, serving

from satchel.runtime.generation.request import Request

WEB = Path(__file__).parents[2] / "samples" / "web"
SCRIPT = Path(__file__).parent / "browser" / "page.mjs"
MARKDOWN = """\
# Title
Some **bold**, *slanted* and `code <b>` with [a link](http://localhost/x) and [none](javascript:alert(1)).
<img src=x onerror="document.title='ran'"><script>document.title='ran'</script>

1. one
   - inner
2. two

| a | b |
|---|--:|
| 1 | <i>2</i> |

> said

```python
print("<b>")  # a < b
```
"""
EXPECTED = (
    "<h3>Title</h3><p>Some <strong>bold</strong>, <em>slanted</em> and <code>code &lt;b&gt;</code> with "
    '<a href="http://localhost/x" target="_blank" rel="noopener noreferrer">a link</a> and '
    "[none](javascript:alert(1)).\n&lt;img src=x onerror=\"document.title='ran'\"&gt;"
    "&lt;script&gt;document.title='ran'&lt;/script&gt;</p>"
    '<ol start="1"><li>one<ul><li>inner</li></ul></li><li>two</li></ol>'
    '<div class="scroll" tabindex="0"><table><thead><tr><th>a</th><th>b</th></tr></thead>'
    "<tbody><tr><td>1</td><td>&lt;i&gt;2&lt;/i&gt;</td></tr></tbody></table></div>"
    '<blockquote><p>said</p></blockquote><pre tabindex="0"><code>print("&lt;b&gt;")  # a &lt; b</code></pre>'
)


CERTIFICATE = {
    "decode": {"kl_mean": 0.0012, "top1": 0.9876, "perplexity": 12.5, "reference_perplexity": None},
    "decode_windows": 4,
    "window_tokens": 256,
    "processor": "a processor",
}


def test_the_page_is_one_file_without_an_outside_address(served: Served) -> None:
    answer = served.get("/")
    assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, "text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"https?://|\bsrc=|\bhref=|@import|url\(|innerHTML|eval\(", answer.text)
    asked = re.findall(r'fetch\("([^"]+)"', answer.text)
    assert asked == ["v1/models", "v1/chat/completions"]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_is_javascript(served: Served, tmp_path: Path) -> None:
    script = re.search(r"<script>(.*)</script>", served.get("/").text, re.DOTALL)
    assert script
    (tmp_path / "page.js").write_text(script[1], encoding="utf-8")
    done = subprocess.run(["node", "--check", tmp_path / "page.js"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_figures_of_a_loaded_model_are_told(served: Served) -> None:
    (model,) = served.get("/v1/models").json()["data"]
    meta = model["meta"]
    assert (meta["precision"], meta["context"], meta["certificate"]) == (
        served.generator.engine.bundle.manifest.precision, served.generator.max_context, None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the page shows and asks while it is used, of a model whose answers are known."""
    node(WEB, "--version")
    bundle = write_chat_bundle(tmp_path_factory.mktemp("page") / "chatty", max_context=2000)
    with serving(bundle) as served:
        model = next(iter(served.state.models.loaded.values()))

        def scripted(request: Request) -> Any:
            slow = "slowly" in model.tokenizer.decode(request.prompt)
            ids = iter([*model.tokenizer.encode_rendered("a " * 600 if slow else MARKDOWN), END])

            def choose(logits: object) -> int:
                time.sleep(0.02 if slow else 0)
                return next(ids)

            return model.generator.new_sequence(request, choose=choose)

        model.scheduler._new_sequence = scripted
        model.__dict__["meta"] = model.meta | {"certificate": CERTIFICATE}
        yield answer(node(WEB, SCRIPT, served.url))
        served.wait_until_idle()


def test_nothing_is_loaded_from_elsewhere_and_nothing_fails(found: dict[str, Any]) -> None:
    refused = [line for line in found["errors"] if "400" in line]
    assert (found["elsewhere"], found["errors"]) == ([], refused)


def test_an_answer_is_rendered_and_nothing_in_it_runs(found: dict[str, Any]) -> None:
    assert found["answer"] == EXPECTED
    assert found["title"] == "satchel"


def test_figures_of_the_answer_and_of_the_certificate_are_shown(found: dict[str, Any]) -> None:
    assert re.fullmatch(r"\d{2,} tokens, [\d.]+ tokens/s", found["figures"])
    for told in ("fp32", "2000 tokens", "0.0012", "0.9876", "a processor"):
        assert told in found["about"]


def test_an_answer_can_be_had_again_with_settings(found: dict[str, Any]) -> None:
    assert found["regenerated"] == ["turn user", "turn assistant"]
    first, again, second = found["bodies"]
    assert first == again
    assert [message["role"] for message in second["messages"]] == ["system", "user", "assistant", "user"]
    assert (second["messages"][0]["content"], second["temperature"], second["seed"]) == ("Be brief.", 0.5, 7)
    assert "temperature" not in first
    assert found["sentWrong"] == 0
    assert "max_tokens" in found["alert"]


def test_an_answer_can_be_stopped(found: dict[str, Any]) -> None:
    assert found["stopEnabled"]
    assert 20 < len(found["stopped"]) < 1000
    assert found["buttons"] == [False, True, False]
    assert found["cleared"] == 0


def test_it_fits_small_screens_has_a_dark_mode_and_names_its_controls(found: dict[str, Any]) -> None:
    assert found["widths"] == found["openWidths"] == [360, 360]
    assert found["light"] != found["dark"] == found["darkAgain"]
    assert (found["unnamed"], found["focus"]) == (0, "text")
    assert found["controls"] >= 15
    assert found["outline"] == "solid"
