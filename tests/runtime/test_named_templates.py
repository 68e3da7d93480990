"""Of several chat templates the right one is taken, by default and by name, and the last message can be continued."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.chat_bundle import write_chat_bundle
from support.chat_templates import TURNS
from support.command import Satchel
from support.jsonl_work import Work, by_id

from satchel.runtime.bundle.reader import read_bundle
from satchel.runtime.errors import PromptError
from satchel.runtime.generation.conversation import Conversation
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.templates.chat_template import ChatTemplate, template_files

PLAIN = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
NAMED = {"tool_use": "<|im_start|>tools {{ tools | tojson }}<|im_end|>" + PLAIN, "rag": "<|im_start|>rag " + PLAIN}
TOOLS = [{"name": "clock"}]
ASKED = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_bundle(tmp_path_factory.mktemp("several") / "bundle", template=PLAIN, more_templates=NAMED)


@pytest.fixture(scope="module")
def generator(several: Path) -> Iterator[Generator]:
    generator = Generator.open(several, threads=1, prefix_cache_mib=0)
    yield generator
    generator.template.close()


@pytest.mark.parametrize(
    ("tools", "template", "expected"),
    [(None, None, "default"), (TOOLS, None, "tool_use"), ([], None, "tool_use"), (TOOLS, "rag", "rag")],
)
def test_the_template_for_tools_is_taken_with_tools_and_any_by_its_name(
    generator: Generator, tools: Any, template: str | None, expected: str
) -> None:
    assert generator.template.choose(template, tools) == expected
    source = {"default": PLAIN, **NAMED}[expected]
    with ChatTemplate(source) as alone:
        text = alone.render(ASKED, tools=tools)
    assert generator.template.render(ASKED, tools=tools, template=template) == text
    ids = generator.need_tokenizer().encode_rendered(text)
    assert generator.encode_chat(ASKED, tools=tools, template=template).tolist() == ids
    talk = Conversation(generator, tools=tools, template=template)
    assert talk.ask("hi").prompt_tokens == len(ids)


def test_run_and_chat_take_a_template_by_its_name(satchel: Satchel, several: Path, generator: Generator) -> None:
    lengths = {name: len(generator.encode_chat(ASKED, template=name)) for name in (None, "rag")}
    assert lengths[None] != lengths["rag"]
    short = ("--threads", 1, "--max-new-tokens", 1)
    assert satchel.json("run", several, "hi", *short)["prompt_tokens"] == lengths[None]
    assert satchel.json("run", several, "hi", *short, "--template", "rag")["prompt_tokens"] == lengths["rag"]
    assert satchel.json("chat", several, "hi", *short, "--template", "rag")["prompt_tokens"] == lengths["rag"]


def test_a_line_names_its_template_or_takes_that_of_the_command(
    satchel: Satchel, several: Path, generator: Generator, tmp_path: Path
) -> None:
    work = Work(satchel, several, tmp_path)
    work.write(
        {"messages": ASKED},
        {"messages": ASKED, "template": "default"},
        {"messages": ASKED, "tools": TOOLS, "template": "tool_use"},
        {"prompt": "hi"},
        {"messages": ASKED, "template": "none"},
        {"messages": ASKED, "template": 3},
        {"prompt": "hi", "template": "rag"},
    )
    work.run("--template", "rag", "--max-new-tokens", 1, code=1)
    rows = by_id(work.rows())
    length = {
        name: len(generator.encode_chat(ASKED, tools=TOOLS if name == "tool_use" else None, template=name))
        for name in ("default", "rag", "tool_use")
    }
    for number, name in enumerate(("rag", "default", "tool_use", "rag"), start=1):
        assert rows[number]["prompt_tokens"] == length[name]
    assert "choose default or rag or tool_use" in rows[5]["error"]
    assert "template 3: must be a text" in rows[6]["error"]
    assert "only a chat template uses them" in rows[7]["error"]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("run", "x", "--template", "none"), "--template none: there is no such chat template: choose default or rag"),
        (("run", "x", "--template", "rag", "--raw"), "--raw"),
        (("chat", "x", "--template", "rag", "--chat-template", "file"), "--chat-template"),
    ],
)
def test_a_wrong_choice_is_one_line(satchel: Satchel, several: Path, flags: tuple[str, ...], part: str) -> None:
    command, *rest = flags
    assert part in satchel.refuses(command, several, *rest)


def test_without_a_default_a_name_is_needed(tmp_path: Path) -> None:
    bundle = write_chat_bundle(tmp_path / "bundle", template=None, more_templates=NAMED)
    assert template_files(read_bundle(bundle)).keys() == NAMED.keys()
    with ChatTemplate.open(read_bundle(bundle)) as template:
        assert template.render(ASKED, tools=TOOLS) == template.render(ASKED, tools=TOOLS, template="tool_use")
        with pytest.raises(PromptError, match="choose rag or tool_use with --template"):
            template.render(ASKED)


PARTS = [{"type": "text", "text": "one"}, {"type": "image"}]


@pytest.mark.parametrize(
    ("source", "messages", "arguments", "message"),
    [
        (PLAIN, TURNS, {"add_generation_prompt": True}, "exclude each other"),
        ("{{ messages | length }}", TURNS, {}, "does not read 'content'"),
        (PLAIN, [*TURNS, {"role": "assistant", "content": [{"type": "image"}]}], {}, "no text as 'content'"),
        (PLAIN, TURNS, {"continue_final_message": "thinking"}, "does not read 'thinking'"),
        ("{{ messages[0].content }}", TURNS, {}, "leaves out the last message"),
    ],
)
def test_a_message_that_cannot_be_continued_is_refused(
    source: str, messages: list[dict[str, Any]], arguments: dict[str, Any], message: str
) -> None:
    given = {"continue_final_message": True, **arguments}
    with ChatTemplate(source) as template, pytest.raises(PromptError, match=message):
        template.render(messages, **given)


def test_the_last_text_of_parts_is_continued_and_messages_stay_as_they_were() -> None:
    messages = [*TURNS, {"role": "assistant", "content": PARTS, "reasoning": "so"}]
    source = "{{ messages[-1].content[0].text }} after; {{ messages[-1].thinking }}{{ messages[-1].content | length }}"
    with ChatTemplate(source) as template:
        assert template.render(messages, continue_final_message=True) == "one"
        assert template.render(messages, continue_final_message="reasoning") == "one after; so"
    assert messages[-1] == {"role": "assistant", "content": PARTS, "reasoning": "so"}
