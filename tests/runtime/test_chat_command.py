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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.chat_bundle import END, write_chat_bundle
from support.tiny_bundle import write_bundle

from satchel.runtime.cli import main as cli
from satchel.runtime.generation.conversation import Answer, Conversation, checkpoint_options
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.result import Generation

COMMAND = [sys.executable, "-m", "satchel.runtime.cli.main", "chat"]
PATIENCE = 60.0  # seconds
SHORT = ("--max-new-tokens", "12")
READY, CTRL_C = "^> ", "\x03"
HINT = "/help lists the commands, Ctrl-D quits\n"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def generator(chatty: Path) -> Iterator[Generator]:
    generator = Generator.open(chatty, threads=1, prefix_cache_mib=0)
    yield generator
    generator.template.close()


def answers(generator: Generator, *questions: str, system: str | None = None, **options: Any) -> list[Generation]:
    """What a conversation in Python gives."""
    talk = Conversation(generator, system=system, options=replace(GenerationOptions(max_new_tokens=12), **options))
    return [talk.ask(question).result() for question in questions]


def chat(monkeypatch: pytest.MonkeyPatch, bundle: Path, lines: str | bytes, *flags: object, short: bool = True) -> int:
    """Run the command in this process on piped input."""
    content = lines.encode() if isinstance(lines, str) else lines
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), "ascii"))
    return cli.main(["chat", str(bundle), "--threads", "1", *(SHORT if short else ()), *map(str, flags)])


def test_each_line_is_a_turn(
    chatty: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert chat(monkeypatch, chatty, "hello\n\n  \nthe 猫\r\nand") == 0
    out, err = capsys.readouterr()
    expected = answers(generator, "hello", "the 猫", "and")
    assert out == "".join(f"{result.text}\n" for result in expected)
    line = r"\[prompt (\d+) tokens( \((\d+) cached\))?, new 12 at [\d.]+ tokens/s \(length\)\]"
    figures = [re.fullmatch(line, shown) for shown in err.splitlines()]
    assert [int(found[1]) for found in figures] == [result.prompt_tokens for result in expected]
    known = [result.prompt_tokens + result.new_tokens - 1 for result in expected]
    assert [found[3] and int(found[3]) for found in figures] == [None, *known[:2]]


def test_a_backslash_goes_on_in_the_next_line_and_two_slashes_are_one(
    chatty: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert chat(monkeypatch, chatty, "one\\\ntwo\\\n three\n//exit\nlast\\\n", "--quiet") == 0
    expected = answers(generator, "one\ntwo\n three", "/exit", "last")
    assert capsys.readouterr() == ("".join(f"{result.text}\n" for result in expected), "")


def test_json_is_an_object_for_each_answer(
    chatty: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    flags = ("--json", "--logprobs", 1, "--temperature", 0.9, "--seed", 4, "--stop", "q")
    assert chat(monkeypatch, chatty, "hello\nthe cat\n", *flags) == 0
    out, err = capsys.readouterr()
    found = [json.loads(line) for line in out.splitlines()]
    expected = answers(generator, "hello", "the cat", logprobs=1, temperature=0.9, seed=4, stop=("q",))
    assert err == ""
    for document, result in zip(found, expected, strict=True):
        assert (document["text"], document["token_ids"]) == (result.text, list(result.token_ids))
        assert (document["finish_reason"], document["prompt_tokens"]) == (result.finish_reason, result.prompt_tokens)
        assert [entry["id"] for entry in document["logprobs"]] == document["token_ids"]
    assert found[0]["reused_tokens"] == 0 < found[1]["reused_tokens"]


def test_a_turn_that_fails_is_reported_and_the_rest_is_done(
    chatty: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    lines = "hello\nforbidden\n/frobnicate\nthe cat\n"
    facts = ["no such talk", "/frobnicate: unknown command"]
    texts = [result.text for result in answers(generator, "hello", "the cat")]
    assert chat(monkeypatch, chatty, lines, "--quiet") == 1
    out, errors = capsys.readouterr()
    assert out == "".join(f"{text}\n" for text in texts)
    assert all(fact in line for fact, line in zip(facts, errors.splitlines(), strict=True))
    assert chat(monkeypatch, chatty, lines, "--json") == 1
    out, err = capsys.readouterr()
    first, *failed, last = map(json.loads, out.splitlines())
    assert (first["text"], last["text"]) == tuple(texts)
    assert [f"satchel: error: {row['error']}" for row in failed] == err.splitlines() == errors.splitlines()


def test_lines_that_are_not_utf_8_end_it_by_their_number(
    chatty: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert chat(monkeypatch, chatty, b"hello\n\nab\xff\nmore\n", "--quiet") == 2
    message = "satchel: error: line 3 of standard input is not UTF-8 text (byte 2): convert it to UTF-8\n"
    assert capsys.readouterr() == (f"{answers(generator, 'hello')[0].text}\n", message)


def test_the_commands(
    chatty: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    path = tmp_path / "talk of today"
    first, second = answers(generator, "hello", "the cat", system="be brief")
    lines = [
        "/history", "hello", f"/save  {path} ", "/reset", "/history", "hello", "/reset\tbe long", "/history",
        f"/load {path}", "the cat", "/help", "/history", "/exit\tnow", "never",
    ]  # fmt: skip
    assert chat(monkeypatch, chatty, "\n".join(lines), "--system", "be brief", "--quiet") == 0
    out, err = capsys.readouterr()
    assert out == f"{first.text}\n{first.text}\n{second.text}\n"
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


def test_the_errors_of_commands(chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.write_text("my diary")
    wrong = {
        "/save": "/save requires a file",
        "/load ": "/load requires a file",
        "/save talk": "nothing to save",
        f"/load {tmp_path}/none": f"{tmp_path}/none: no such file",
        f"/load {notes}": f"{notes}: ",
        "/": "/: unknown command",
        "/Exit": "/Exit: unknown command",
        "/\x1b[1m": r"/\x1b[1m: unknown command",
    }
    for line, fact in wrong.items():
        assert chat(monkeypatch, chatty, line, "--quiet") == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith("satchel: error: ")
        assert fact in err
    for name, message in (("none/talk", f"there is no folder {tmp_path}/none"), ("", "this is a folder")):
        assert chat(monkeypatch, chatty, f"hello\n/save {tmp_path}/{name}\nhello", "--quiet") == 1
        out, err = capsys.readouterr()
        assert out.count("\n") == 2
        assert re.fullmatch(rf"satchel: error: /save {tmp_path}/?{name}: {message}: .*\n", err)


def test_a_saved_conversation_is_gone_on_with(
    chatty: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    path = tmp_path / "talk.state"
    assert chat(monkeypatch, chatty, f"hello\n/save {path}\n", "--quiet") == 0
    capsys.readouterr()
    assert chat(monkeypatch, chatty, "the cat\n", "--load-state", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    first, second = answers(generator, "hello", "the cat")
    assert (found["text"], found["reused_tokens"]) == (second.text, first.prompt_tokens + 11)
    assert chat(monkeypatch, chatty, "the cat\n", "--load-state", path, "--system", "x") == 2
    err = capsys.readouterr().err
    assert "--system" in err
    assert "--load-state" in err


def test_a_state_of_run_is_no_conversation(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    path = tmp_path / "run.state"
    assert cli.main(["run", str(chatty), "the cat", "--max-new-tokens", "3", "--save-state", str(path)]) == 0
    capsys.readouterr()
    for code, lines, *flags in ((2, "hello\n", "--load-state", path), (1, f"/load {path}\nhello\n", "--quiet")):
        assert chat(monkeypatch, chatty, lines, *flags) == code
        out, err = capsys.readouterr()
        assert out.count("\n") == 2 - code
        assert err.startswith(f"satchel: error: {path}: does not hold a conversation")
        assert err.count("\n") == 1


def test_sampling_starts_from_the_checkpoint_and_flags_count_more(
    tmp_path: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    config = {"do_sample": True, "temperature": 6.5, "top_k": 30, "repetition_penalty": 1.2}
    folder = write_chat_bundle(tmp_path / "own", generation_config=config)
    own = Generator.open(folder, threads=1)
    options = replace(checkpoint_options(own, {"seed": 3}), max_new_tokens=12)
    assert (options.temperature, options.top_k, options.repetition_penalty) == (6.5, 30, 1.2)
    wanted = [
        (("--seed", 3), options),
        (("--seed", 3, "--top-k", 2, "--temperature", 9.5), replace(options, top_k=2, temperature=9.5)),
        (("--temperature", 0), GenerationOptions(max_new_tokens=12, repetition_penalty=1.2)),
    ]
    found = []
    for flags, expected in wanted:
        assert chat(monkeypatch, folder, "hello\n", *flags, "--quiet") == 0
        fields = {name: getattr(expected, name) for name in expected.__dataclass_fields__}
        found.append(capsys.readouterr().out)
        assert found[-1] == f"{answers(generator, 'hello', **fields)[0].text}\n"
    assert len(set(found)) == 3


def test_a_full_context_drops_the_oldest_turns_and_says_so_once(
    chatty: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert chat(monkeypatch, chatty, "hello\nthe cat\nand\n", "--max-context", 60, short=False) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 3
    figures = re.findall(r"prompt (\d+) tokens.*, new (\d+) at", err)
    assert [int(prompt) + int(new) for prompt, new in figures] == [61, 61, 61]
    assert err.count("--max-context") == 1
    assert "the oldest 2 messages" in err
    assert chat(monkeypatch, chatty, f"{'x' * 80}\n", "--max-context", 60, "--quiet", short=False) == 1
    assert "tokens but the context holds 60: " in capsys.readouterr().err


def test_without_a_limit_an_answer_has_1024_tokens_and_a_loop_is_ended(
    endless: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert chat(monkeypatch, endless, "hello\n", "--json", "--max-repeats", 0, short=False) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 1024
    assert chat(monkeypatch, endless, "hello\n", "--logit-bias", "261=1000", short=False) == 0
    err = capsys.readouterr().err
    assert "new 128 at" in err
    assert "(loop)]\n" in err
    assert "--max-repeats 0" in err


def test_a_question_on_the_command_line_is_answered_once(
    chatty: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (result,) = answers(generator, "/exit")
    for flags in (["/exit"], ["--prompt", "/exit"], ["-p", "/exit"]):
        assert chat(monkeypatch, chatty, "never read\n", *flags) == 0
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == (f"{result.text}\n", 1)
    assert chat(monkeypatch, chatty, "", "forbidden", "--quiet") == 2
    assert "no such talk" in capsys.readouterr().err
    assert chat(monkeypatch, chatty, "", "a", "-p", "b") == 2
    assert "--prompt" in capsys.readouterr().err


def test_the_template_its_tools_and_its_arguments_can_be_given(
    chatty: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: Capture, tmp_path: Path
) -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    flags = ("--tools", tmp_path / "tools.json", "--template-argument", 'mood="merry "')
    assert chat(monkeypatch, chatty, "hello\n", *flags, "--json") == 0
    talk = Conversation(generator, tools=tools, arguments={"mood": "merry "})
    talk.options = replace(talk.options, max_new_tokens=12)
    expected = talk.ask("hello").result()
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["prompt_tokens"]) == (expected.text, expected.prompt_tokens)
    (tmp_path / "own.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    assert chat(monkeypatch, chatty, "hello\n", "--chat-template", tmp_path / "own.jinja", "--json") == 0
    ids = [1, *generator.tokenizer.encode_rendered("hello"), END]
    found = json.loads(capsys.readouterr().out)
    assert (found["text"], found["prompt_tokens"]) == (generator.generate(ids, 12).text, len(ids))


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
    chatty: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    tmp_path: Path,
    flags: list[str],
    message: str,
) -> None:
    for name, content in {"text": b"x", "object": b"{}", "deep": b"[" * 9999, "bytes": b"\xff", "wrong": b"{%"}.items():
        (tmp_path / name).write_bytes(content)
    flags = [str(flag).replace("HERE", str(tmp_path)) for flag in flags]
    assert chat(monkeypatch, chatty, "hello\n", *flags) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("satchel: error: " + message.replace("HERE", str(tmp_path)))


def test_a_bundle_without_a_template_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    folder = write_bundle(tmp_path / "bare")
    assert chat(monkeypatch, folder, "hello\n") == 2
    assert "no chat template" in capsys.readouterr().err


def test_another_program_gets_each_answer_before_it_asks_again(chatty: Path, generator: Generator) -> None:
    expected = answers(generator, "hello", "the cat")
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


def test_ctrl_c_at_the_prompt_clears_what_was_typed(
    chatty: Path, generator: Generator, terminals: list[Terminal]
) -> None:
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
    (result,) = answers(generator, "two")
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


def typed(monkeypatch: pytest.MonkeyPatch, bundle: Path, *lines: str) -> tuple[int, list[str]]:
    """The command in this process on lines that seem to be typed; the exit code, and the prompts of `input`."""
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
    return cli.main(["chat", str(bundle), "--threads", "1", *SHORT]), prompts


def test_prompts_do_not_get_among_answers_that_go_elsewhere(
    chatty: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert typed(monkeypatch, chatty, "hello\\", "you", "/exit", "never") == (0, ["", "", ""])
    (result,) = answers(generator, "hello\nyou")
    out, err = capsys.readouterr()
    assert out == f"{result.text}\n"
    assert re.fullmatch(rf"{HINT}> \.\.\. \[prompt [^\n]+\]\n> ", err)


def test_only_a_slash_at_the_very_beginning_makes_a_command(
    chatty: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert typed(monkeypatch, chatty, "\\", "/exit", " /exit", "last\\")[0] == 0
    expected = answers(generator, "\n/exit", " /exit", "last")
    assert capsys.readouterr().out == "".join(f"{result.text}\n" for result in expected)


def test_an_interrupt_before_the_answer_begins_drops_the_question(
    chatty: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    ask, calls = Conversation.ask, []

    def interrupted(*arguments: Any, **more: Any) -> Answer:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return ask(*arguments, **more)

    monkeypatch.setattr(Conversation, "ask", interrupted)
    assert typed(monkeypatch, chatty, "the cat", "hello")[0] == 0
    assert capsys.readouterr().out == f"{answers(generator, 'hello')[0].text}\n"


def test_each_piece_is_shown_at_once(chatty: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []

    class Output(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Output())
    assert chat(monkeypatch, chatty, "hello\n", "--quiet") == 0
    pieces = list(Conversation(generator, options=GenerationOptions(max_new_tokens=12)).ask("hello"))
    assert flushed[: len(pieces)] == list(itertools.accumulate(pieces))
