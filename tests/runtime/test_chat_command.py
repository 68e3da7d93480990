"""`satchel chat`: piped lines, commands, a terminal with Ctrl-C, and what goes to standard output."""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.chat_bundle import END, write_chat_bundle
from support.command import Said, Satchel

from satchel.runtime.generation.conversation import Answer, Conversation, checkpoint_options
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.result import Generation

COMMAND = [sys.executable, "-m", "satchel.runtime.cli.main", "chat"]
PATIENCE = 60.0  # seconds
SHORT = ("--max-new-tokens", "12")
READY, CTRL_C = "^> ", "\x03"
HINT = "/help lists the commands, Ctrl-D quits\n"
Chat = Callable[..., Said]


def answers(generator: Generator, *questions: str, system: str | None = None, **options: Any) -> list[Generation]:
    """What a conversation in Python gives."""
    talk = Conversation(generator, system=system, options=replace(GenerationOptions(max_new_tokens=12), **options))
    return [talk.ask(question).result() for question in questions]


@pytest.fixture
def chat(satchel: Satchel, chatty: Path) -> Chat:
    """`satchel chat` on piped lines, by default of answers with 12 tokens."""

    def run(lines: str | bytes, *flags: object, code: int = 0, bundle: Path = chatty) -> Said:
        return satchel("chat", bundle, "--threads", 1, *SHORT, *flags, stdin=lines, code=code)

    return run


def lines_of(results: list[Generation]) -> str:
    return "".join(f"{result.text}\n" for result in results)


def test_each_line_is_a_turn(chat: Chat, plain: Generator) -> None:
    out, err = chat("hello\n\n  \nthe 猫\r\nand")
    expected = answers(plain, "hello", "the 猫", "and")
    assert out == lines_of(expected)
    line = r"\[prompt (\d+) tokens( \((\d+) cached\))?, new 12 at [\d.]+ tokens/s \(length\)\]"
    figures = [re.fullmatch(line, shown) for shown in err.splitlines()]
    assert [int(found[1]) for found in figures] == [result.prompt_tokens for result in expected]
    known = [result.prompt_tokens + result.new_tokens - 1 for result in expected]
    assert [found[3] and int(found[3]) for found in figures] == [None, *known[:2]]


def test_a_backslash_goes_on_in_the_next_line_and_two_slashes_are_one(chat: Chat, plain: Generator) -> None:
    said = chat("one\\\ntwo\\\n three\n//exit\nlast\\\n", "--quiet")
    assert said == (lines_of(answers(plain, "one\ntwo\n three", "/exit", "last")), "")


def test_json_is_an_object_for_each_answer(chat: Chat, plain: Generator) -> None:
    flags = ("--json", "--logprobs", 1, "--temperature", 0.9, "--seed", 4, "--stop", "q")
    out, err = chat("hello\nthe cat\n", *flags)
    found = [json.loads(line) for line in out.splitlines()]
    expected = answers(plain, "hello", "the cat", logprobs=1, temperature=0.9, seed=4, stop=("q",))
    assert err == ""
    for document, result in zip(found, expected, strict=True):
        assert (document["text"], document["token_ids"]) == (result.text, list(result.token_ids))
        assert (document["finish_reason"], document["prompt_tokens"]) == (result.finish_reason, result.prompt_tokens)
        assert [entry["id"] for entry in document["logprobs"]] == document["token_ids"]
    assert found[0]["reused_tokens"] == 0 < found[1]["reused_tokens"]


def test_a_turn_that_fails_is_reported_and_the_rest_is_done(chat: Chat, plain: Generator) -> None:
    lines = "hello\nforbidden\n/frobnicate\nthe cat\n"
    facts = ["no such talk", "/frobnicate: unknown command"]
    expected = answers(plain, "hello", "the cat")
    out, errors = chat(lines, "--quiet", code=1)
    assert out == lines_of(expected)
    assert all(fact in line for fact, line in zip(facts, errors.splitlines(), strict=True))
    out, err = chat(lines, "--json", code=1)
    first, *failed, last = map(json.loads, out.splitlines())
    assert [first["text"], last["text"]] == [result.text for result in expected]
    assert [f"satchel: error: {row['error']}" for row in failed] == err.splitlines() == errors.splitlines()


def test_lines_that_are_not_utf_8_end_it_by_their_number(chat: Chat, plain: Generator) -> None:
    out, err = chat(b"hello\n\nab\xff\nmore\n", "--quiet", code=2)
    assert out == lines_of(answers(plain, "hello"))
    assert err.startswith("satchel: error: line 3 of standard input is not UTF-8 text (byte 2): ")


def test_the_commands(chat: Chat, plain: Generator, tmp_path: Path) -> None:
    path = tmp_path / "talk of today"
    first, second = answers(plain, "hello", "the cat", system="be brief")
    lines = [
        "/history", "hello", f"/save  {path} ", "/reset", "/history", "hello", "/reset\tbe long", "/history",
        f"/load {path}", "the cat", "/help", "/history", "/exit\tnow", "never",
    ]  # fmt: skip
    out, err = chat("\n".join(lines), "--system", "be brief", "--quiet")
    assert out == lines_of([first, first, second])
    help_text, rest = err[err.index("/reset [TEXT]") :].split("Ctrl-C stops an answer.", 1)
    assert "/load FILE" in help_text
    assert err[: err.index("/reset [TEXT]")].splitlines() == [
        "system: be brief",
        f"{path}: {first.prompt_tokens + 11} tokens saved",
        "conversation reset",
        "system: be brief",
        "conversation reset",
        "system: be long",
        f"{path}: 3 messages loaded",
    ]
    assert rest.partition("\n")[2].split("\n", 1)[0] == "system: be brief"
    assert f"user: hello\nassistant: {first.text}\nuser: the cat\nassistant: {second.text}\n" in rest


def test_the_errors_of_commands(chat: Chat, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.write_text("my diary")
    for line, fact in {
        "/save": "/save requires a file",
        "/load ": "/load requires a file",
        "/save talk": "nothing to save",
        f"/load {tmp_path}/none": f"{tmp_path}/none: no such file",
        f"/load {notes}": f"{notes}: ",
        "/": "/: unknown command",
        "/Exit": "/Exit: unknown command",
        "/\x1b[1m": r"/\x1b[1m: unknown command",
        f"hello\n/save {tmp_path}/none/talk\nhello": f"/save {tmp_path}/none/talk: there is no folder {tmp_path}/none",
        f"hello\n/save {tmp_path}\nhello": f"/save {tmp_path}: this is a folder",
    }.items():
        out, err = chat(line, "--quiet", code=1)
        assert (out.count("\n"), err.count("\n")) == (line.count("hello"), 1)
        assert err.startswith("satchel: error: ")
        assert fact in err


def test_a_saved_conversation_is_gone_on_with(chat: Chat, plain: Generator, tmp_path: Path) -> None:
    path = tmp_path / "talk.state"
    chat(f"hello\n/save {path}\n", "--quiet")
    found = json.loads(chat("the cat\n", "--load-state", path, "--json").out)
    first, second = answers(plain, "hello", "the cat")
    assert (found["text"], found["reused_tokens"]) == (second.text, first.prompt_tokens + 11)
    err = chat("the cat\n", "--load-state", path, "--system", "x", code=2).err
    assert "--system" in err
    assert "--load-state" in err


def test_a_state_of_run_is_no_conversation(chat: Chat, satchel: Satchel, chatty: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.state"
    satchel("run", chatty, "the cat", "--max-new-tokens", 3, "--save-state", path)
    for code, lines, *flags in ((2, "hello\n", "--load-state", path), (1, f"/load {path}\nhello\n", "--quiet")):
        out, err = chat(lines, *flags, code=code)
        assert (out.count("\n"), err.count("\n")) == (2 - code, 1)
        assert err.startswith(f"satchel: error: {path}: does not hold a conversation")


def test_sampling_starts_from_the_checkpoint_and_flags_count_more(chat: Chat, tmp_path: Path, plain: Generator) -> None:
    config = {"do_sample": True, "temperature": 6.5, "top_k": 30, "repetition_penalty": 1.2}
    folder = write_chat_bundle(tmp_path / "own", generation_config=config)
    options = replace(checkpoint_options(Generator.open(folder, threads=1), {"seed": 3}), max_new_tokens=12)
    assert (options.temperature, options.top_k, options.repetition_penalty) == (6.5, 30, 1.2)
    found = set()
    for flags, expected in (
        (("--seed", 3), options),
        (("--seed", 3, "--top-k", 2, "--temperature", 9.5), replace(options, top_k=2, temperature=9.5)),
        (("--temperature", 0), GenerationOptions(max_new_tokens=12, repetition_penalty=1.2)),
    ):
        fields = {name: getattr(expected, name) for name in expected.__dataclass_fields__}
        out = chat("hello\n", *flags, "--quiet", bundle=folder).out
        assert out == lines_of(answers(plain, "hello", **fields))
        found.add(out)
    assert len(found) == 3


def test_a_full_context_drops_the_oldest_turns_and_says_so_once(satchel: Satchel, chatty: Path) -> None:
    command = ("chat", chatty, "--threads", 1, "--max-context", 60)
    out, err = satchel(*command, stdin="hello\nthe cat\nand\n")
    assert out.count("\n") == 3
    figures = re.findall(r"prompt (\d+) tokens.*, new (\d+) at", err)
    assert [int(prompt) + int(new) for prompt, new in figures] == [61, 61, 61]
    assert err.count("--max-context") == 1
    assert "the oldest 2 messages" in err
    assert "tokens but the context holds 60: " in satchel(*command, stdin=f"{'x' * 80}\n", code=1).err


def test_without_a_limit_an_answer_has_1024_tokens_and_a_loop_is_ended(satchel: Satchel, endless: Path) -> None:
    command = ("chat", endless, "--threads", 1)
    out = satchel(*command, "--json", "--max-repeats", 0, stdin="hello\n").out
    assert json.loads(out)["new_tokens"] == 1024
    err = satchel(*command, "--logit-bias", "261=1000", stdin="hello\n").err
    assert "new 128 at" in err
    assert "(loop)]\n" in err
    assert "--max-repeats 0" in err


def test_a_question_on_the_command_line_is_answered_once(chat: Chat, plain: Generator) -> None:
    for flags in (["/exit"], ["--prompt", "/exit"], ["-p", "/exit"]):
        out, err = chat("never read\n", *flags)
        assert (out, err.count("\n")) == (lines_of(answers(plain, "/exit")), 1)
    assert "no such talk" in chat("", "forbidden", "--quiet", code=2).err
    assert "--prompt" in chat("", "a", "-p", "b", code=2).err


def test_the_template_its_tools_and_its_arguments_can_be_given(chat: Chat, plain: Generator, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    flags = ("--tools", tmp_path / "tools.json", "--template-argument", 'mood="merry "')
    found = json.loads(chat("hello\n", *flags, "--json").out)
    talk = Conversation(plain, tools=tools, arguments={"mood": "merry "})
    talk.options = replace(talk.options, max_new_tokens=12)
    expected = talk.ask("hello").result()
    assert (found["text"], found["prompt_tokens"]) == (expected.text, expected.prompt_tokens)
    (tmp_path / "own.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    found = json.loads(chat("hello\n", "--chat-template", tmp_path / "own.jinja", "--json").out)
    ids = [1, *plain.tokenizer.encode_rendered("hello"), END]
    assert (found["text"], found["prompt_tokens"]) == (plain.generate(ids, 12).text, len(ids))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--logprobs", 1], "--logprobs requires --json"),
        (["--max-new-tokens", -1], "--max-new-tokens -1: "),
        (["--seed", 3], "--seed 3: "),
        (["--max-context", 0], "--max-context 0: this bundle allows 1 to 400"),
        (["--prefix-cache-mib", -1], "--prefix-cache-mib -1: "),
        (["--threads", 0], "--threads 0: "),
        (["--tools", "HERE/none"], "--tools HERE/none: cannot be read (No such file or directory)"),
        (["--tools", "HERE/text"], "--tools HERE/text: not valid JSON"),
        (["--template-argument", "tools=[]"], "--template-argument tools=[]: tools is a reserved name"),
        (["--tools", "HERE/object"], "--tools HERE/object: must "),
        (["--tools", "HERE/deep"], "--tools HERE/deep: not valid JSON"),
        (["--tools", "HERE/bytes"], "--tools HERE/bytes: not UTF-8"),
        (["--template-argument", "x"], "--template-argument x: "),
        (["--template-argument", "x=y"], "--template-argument x=y: "),
        (["--template-argument", "a b=1"], "--template-argument a b=1: "),
        (["--chat-template", "HERE/wrong"], "the chat template cannot be read at line 1: "),
        (["--chat-template", "HERE/none"], "--chat-template HERE/none: "),
        (["--load-state", "HERE/none"], "HERE/none: no such file"),
    ],
)
def test_wrong_flags_are_one_line_and_exit_code_2(
    satchel: Satchel, chatty: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    for name, content in {"text": b"x", "object": b"{}", "deep": b"[" * 9999, "bytes": b"\xff", "wrong": b"{%"}.items():
        (tmp_path / name).write_bytes(content)
    flags = [str(flag).replace("HERE", str(tmp_path)) for flag in flags]
    said = satchel.refuses("chat", chatty, *SHORT, *flags, stdin="hello\n")
    assert said.startswith(message.replace("HERE", str(tmp_path)))


def test_another_program_gets_each_answer_before_it_asks_again(chatty: Path, plain: Generator) -> None:
    expected = answers(plain, "hello", "the cat")
    command = [*COMMAND, str(chatty), "--json", *SHORT, "--threads", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        for question, result in zip((b"hello\n", b"the cat\n"), expected, strict=True):
            process.stdin.write(question)
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["text"] == result.text
        process.stdin.close()
        assert process.wait(timeout=PATIENCE) == 0


class Terminal:
    """A `satchel chat` on a terminal of its own."""

    def __init__(self, bundle: Path, *flags: str) -> None:
        self._main, side = pty.openpty()
        attributes = termios.tcgetattr(side)
        attributes[3] &= ~termios.ECHO  # what is typed is not shown
        termios.tcsetattr(side, termios.TCSANOW, attributes)
        self.process = subprocess.Popen(
            [*COMMAND, str(bundle), "--threads", "1", *flags],
            stdin=side,
            stdout=side,
            stderr=side,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # else Ctrl-C would be a character like others
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(side)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._main, text.encode())

    def ask(self, question: str) -> None:
        """Ask, and wait for the beginning of the answer."""
        self.type(f"{question}\n")
        self.until("[a-z]{3}")

    def until(self, pattern: str, nudge: str = "") -> str:
        """What is shown up to and with a pattern, from where the last call ended.

        `nudge` is typed now, and every second: a Ctrl-C between a prompt and the wait for a key is heard at the next.
        """
        end = time.monotonic() + PATIENCE
        while not (found := re.search(pattern, self.seen, re.MULTILINE)):
            assert time.monotonic() < end, self.seen[-1000:]
            self.type(nudge)
            while time.monotonic() < end and select.select([self._main], [], [], 1)[0]:
                self.seen = (self.seen + os.read(self._main, 1 << 16).decode("utf-8", "replace")).replace("\r\n", "\n")
                if re.search(pattern, self.seen, re.MULTILINE):
                    break
        shown, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return shown

    def end(self) -> int:
        code = self.process.wait(timeout=PATIENCE)
        os.close(self._main)
        return code


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    opened: list[Terminal] = []
    yield opened
    for terminal in opened:
        terminal.process.kill()
        terminal.process.wait()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose answers take many seconds."""
    folder = tmp_path_factory.mktemp("bundles") / "endless"
    return write_chat_bundle(folder, eos_token_ids=(), max_context=100_000)


def test_ctrl_c_ends_an_answer_and_not_the_program(endless: Path, terminals: list[Terminal]) -> None:
    terminal = Terminal(endless)
    terminals.append(terminal)
    assert terminal.until(READY) == f"{HINT}> "
    terminal.ask("hello")
    terminal.type(CTRL_C)
    first = terminal.until(r"\(closed\)\]\n")
    prompt, new = map(int, re.search(r" \.\.\.\n\[prompt (\d+) tokens, new (\d+) at", first).groups())
    terminal.until(READY)
    terminal.until("^/exit or Ctrl-D quits\n> ", nudge=CTRL_C)
    terminal.ask("the cat")
    terminal.type(CTRL_C)
    kept = int(re.search(r"\((\d+) cached\)", terminal.until(r"\(closed\)\]\n"))[1])
    assert prompt + new - 1 <= kept <= prompt + new
    terminal.until(READY)
    terminal.type("/history\n")
    assert re.search(r"(?s)user: hello\nassistant: .+\nuser: the cat\nassistant: .+", terminal.until(READY))
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_at_the_prompt_clears_what_was_typed(chatty: Path, plain: Generator, terminals: list[Terminal]) -> None:
    terminal = Terminal(chatty, *SHORT)
    terminals.append(terminal)
    terminal.until(READY)
    terminal.type("one\\\n")
    terminal.until(r"^\.\.\. ")
    terminal.until("^/exit or Ctrl-D quits\n> ", nudge=CTRL_C)
    terminal.type("/nothing\n")
    assert "satchel: error: /nothing: unknown command" in terminal.until(READY)
    terminal.type("two\n")
    shown = terminal.until(r"\(length\)\]\n> ")
    (result,) = answers(plain, "two")
    assert f"[prompt {result.prompt_tokens} tokens, new 12 at " in shown
    terminal.type("/exit\n")
    assert terminal.end() == 0


def test_an_interrupt_of_piped_lines_ends_the_program(endless: Path) -> None:
    command = [*COMMAND, str(endless), "--threads", "1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"hello\nthe cat\n")
        process.stdin.flush()
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, b"satchel: interrupted\n")
    assert out.endswith(b"\n")


def typed(monkeypatch: pytest.MonkeyPatch, satchel: Satchel, bundle: Path, *lines: str) -> tuple[Said, list[str]]:
    """What the command says to lines that seem to be typed, and the prompts of `input`."""
    waiting, prompts = iter(lines), []

    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return True

    def read(prompt: str) -> str:
        prompts.append(prompt)
        line = next(waiting, None)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr(sys, "stdin", Typed())
    monkeypatch.setattr("builtins.input", read)
    return satchel("chat", bundle, "--threads", 1, *SHORT), prompts


def test_prompts_do_not_get_among_answers_that_go_elsewhere(
    satchel: Satchel, chatty: Path, plain: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out, err), prompts = typed(monkeypatch, satchel, chatty, "hello\\", "you", "/exit", "never")
    assert (out, prompts) == (lines_of(answers(plain, "hello\nyou")), ["", "", ""])
    assert re.fullmatch(rf"{HINT}> \.\.\. \[prompt [^\n]+\]\n> ", err)


def test_only_a_slash_at_the_very_beginning_makes_a_command(
    satchel: Satchel, chatty: Path, plain: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (out, _), _ = typed(monkeypatch, satchel, chatty, "\\", "/exit", " /exit", "last\\")
    assert out == lines_of(answers(plain, "\n/exit", " /exit", "last"))


def test_an_interrupt_before_the_answer_begins_drops_the_question(
    satchel: Satchel, chatty: Path, plain: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, calls = Conversation.ask, []

    def interrupted(*arguments: Any, **more: Any) -> Answer:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return ask(*arguments, **more)

    monkeypatch.setattr(Conversation, "ask", interrupted)
    (out, _), _ = typed(monkeypatch, satchel, chatty, "the cat", "hello")
    assert out == lines_of(answers(plain, "hello"))


def test_each_piece_is_shown_at_once(chat: Chat, plain: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []

    class Output(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Output())
    chat("hello\n", "--quiet")
    pieces = list(Conversation(plain, options=GenerationOptions(max_new_tokens=12)).ask("hello"))
    assert flushed[: len(pieces)] == list(itertools.accumulate(pieces))
