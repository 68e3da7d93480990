"""What the documents say is true: their code runs, their lists are complete, their links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from integration.conftest import CHECKOUT
from support.chat_bundle import write_chat_bundle

from satchel.export.checkpoint import families
from satchel.runtime import Conversation, Generator
from satchel.runtime.bundle import manifest

README = CHECKOUT / "README.md"
DOCUMENTS = [README, *sorted((CHECKOUT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def section(text: str, title: str) -> str:
    """What stands below a heading, up to the next one of its level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^\1 |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"no section {title}"
    return found[2]


def test_the_code_of_the_guide_to_passes_runs_and_its_tests_pass() -> None:
    code = "\n".join(BLOCK.findall((CHECKOUT / "docs" / "writing-a-pass.md").read_text()))
    names: dict[str, Any] = {"__name__": "guide"}
    exec(compile(code, "docs/writing-a-pass.md", "exec"), names)  # our own document
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 5
    for test in tests:
        test()


def test_the_code_of_the_readme_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_chat_bundle(tmp_path / "BUNDLE")
    continued = Generator.open(bundle).generate("The capital of France is", max_new_tokens=32).text
    answer = "".join(Conversation(Generator.open(bundle)).ask("What is the capital of Italy?"))
    monkeypatch.chdir(tmp_path)
    (code,) = BLOCK.findall(README.read_text())
    exec(compile(code, "README.md", "exec"), {})  # our own document
    assert capsys.readouterr().out == f"{continued}\n{answer}"
    assert continued and answer


def test_the_page_of_models_lists_every_family() -> None:
    text = section((CHECKOUT / "docs" / "models.md").read_text(), "Families")
    tested, refused = text.split("| reason |", 1)
    (names,) = re.findall(r"^`.*`$", tested, re.MULTILINE)
    assert set(re.findall(r"`([\w-]+)`", names)) == set(families.PASSED)
    listed = {
        name: reason.strip() for reason, names in re.findall(r"^\| (.*?) \| (`.*`) \|$", refused, re.MULTILINE)
        for name in re.findall(r"`([\w-]+)`", names)
    }  # fmt: skip
    assert listed == families.REFUSED


def keys(kind: type) -> set[str]:
    """The names of a dataclass's fields, and of those of the dataclasses in this module that they hold."""
    found = set()
    for field in dataclasses.fields(kind):
        found.add(field.name)
        for name in re.findall(r"\w+", str(field.type)):
            inner = getattr(manifest, name, None)
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                found |= keys(inner)
    return found


def test_the_bundle_format_explains_every_key_of_the_manifest() -> None:
    text = (CHECKOUT / "docs" / "bundle-format.md").read_text()
    wanted = keys(manifest.Manifest) | {"format", "version"}
    assert len(wanted) > 30
    assert {key for key in wanted if f"`{key}`" not in text} == set()


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_links_lead_somewhere(document: Path) -> None:
    for path, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", document.read_text()):
        target = document.parent / path if path else document
        assert path.startswith("https://") or target.exists(), path
        assert not anchor or path.startswith("https://") or anchor in anchors(target), f"{path}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_files_that_are_named_exist(document: Path) -> None:
    named = re.findall(r"`((?:export|graphs|runtime|tests|samples|docs)/[\w./-]*)`", document.read_text())
    assert [name for name in named if not (CHECKOUT / name).exists()] == []
