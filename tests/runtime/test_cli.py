"""The command line: what goes to standard output and to standard error, and the exit codes."""

from __future__ import annotations

import io
import itertools
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_bundle import read_manifest, write_bundle, write_manifest

from satchel.runtime.cli import main as cli
from satchel.runtime.generation.generator import Generator
from satchel.runtime.util.cpu import usable_cpus

COMMAND = [sys.executable, "-m", "satchel.runtime.cli.main"]


def satchel(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose context takes many seconds to fill."""
    return write_bundle(tmp_path_factory.mktemp("bundles") / "endless", max_context=100_000)


@pytest.fixture
def running(endless: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `satchel run` that has begun to print."""
    command = [*COMMAND, "run", str(endless), "the cat", "--max-new-tokens", "99000", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        yield process
        process.kill()


def test_run_takes_the_prompt_from_standard_input_less_one_newline(tiny: Path, generator: Generator) -> None:
    done = satchel("run", tiny, "--max-new-tokens", "5", "--quiet", stdin="the 猫\n\n".encode())
    assert done.stdout.decode() == generator.generate("the 猫\n", 5).text + "\n"
    assert done.stderr == b""


def test_run_flushes_each_piece(tiny: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []

    class Output(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Output())
    assert cli.main(["run", str(tiny), "the cat sat", "--max-new-tokens", "20", "--threads", "1"]) == 0
    with generator.stream("the cat sat", 20) as stream:
        assert flushed[:3] == list(itertools.accumulate(stream))[:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere", "x"], "nowhere: no such file or folder"),
        (["run", "TINY", "x", "--max-context", "65"], "--max-context 65: this bundle allows 1 to 64"),
        (["run", "TINY", "x", "--max-new-tokens", "-1"], "--max-new-tokens -1: must be 0 or more"),
        (["run", "TINY", "x", "--threads", "0"], "--threads 0: there must be at least 1 thread"),
        (["run", "TINY", "x", "--provider", "tpu"], "--provider tpu: unknown: choose one of cpu"),
        (["run", "TINY", "x" * 200], "tokens but the context holds 64: shorten the prompt or raise --max-context"),
        (["bench", "TINY"], "640 positions is not possible: this bundle allows 1 to 64: ask for fewer tokens"),
        (["bench", "TINY", "--vocabulary", "401"], "--vocabulary 401: must be from 101 to the bundle's 400"),
        (["bench", "TINY", "--prompt-tokens", "0"], "--prompt-tokens and --new-tokens must be 1 or more"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    tiny: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main([str(tiny) if argument == "TINY" else argument for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("satchel: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_prompt_may_stand_behind_flags(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for order in (["the cat", "--max-new-tokens", "5"], ["--max-new-tokens", "5", "the cat"]):
        assert cli.main(["run", str(tiny), "--quiet", *order]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    for arguments in (
        ["--max-new-tokens", "5", "the", "cat"],
        ["the", "--max-new-tokens", "5", "cat"],
        ["x", "--nothing"],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["run", str(tiny), *arguments])
        assert stop.value.code == 2
        assert "satchel run --help" in capsys.readouterr().err


def test_wrong_arguments_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["run"], ["frobnicate"], ["run", "b", "p", "--max-new-tokens", "many"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"satchel: error: .* \(see satchel.* --help\)\n", err)


def test_input_that_is_not_utf_8_is_refused(tiny: Path) -> None:
    done = satchel("run", tiny, stdin=b"ab\xff")
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"standard input is not UTF-8 text (byte 2): convert it to UTF-8" in done.stderr


def test_an_interrupt_ends_the_line_and_exits_130(running: subprocess.Popen[bytes]) -> None:
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert out.endswith(b"\n")
    assert err == b"satchel: interrupted\n"


def test_a_reader_that_leaves_is_no_error(running: subprocess.Popen[bytes]) -> None:
    running.stdout.close()
    assert running.wait(timeout=30) == 0
    assert running.stderr.read() == b""


def test_a_missing_package_of_the_exporter_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module = "def configure(parser): pass\ndef main(args):\n    import onnxscript.missing\n"
    (tmp_path / "needs_onnxscript.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "export", cli.Command("needs_onnxscript", "needs more"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert cli.main(["export"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("satchel: error: onnxscript is not installed: pip install 'onnxscript")
    assert "satchel[" not in err


def test_another_missing_module_is_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = "def configure(parser): pass\ndef main(args):\n    import no_such_module_here\n"
    (tmp_path / "needs_nothing.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "export", cli.Command("needs_nothing", "needs nothing"))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
        cli.main(["export"])


def test_an_error_that_names_what_a_bundle_says_moves_no_cursor(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "bundle"))
    document = read_manifest(folder)
    document["model"]["\x1b[2J\nsatchel: fine"] = 1
    write_manifest(folder, document)
    assert cli.main(["inspect", str(folder)]) == 2
    err = capsys.readouterr().err
    assert r"unknown key 'model.\x1b[2J\nsatchel: fine'" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "says", "help_of"),
    [
        (["rnu", "b"], "did you mean run?", "satchel"),
        (["run", "b", "x", "--max-new-tokns", "5"], "did you mean --max-new-tokens?", "satchel run"),
        (["bench", "b", "--new"], "did you mean --new-tokens?", "satchel bench"),  # an abbreviation is not taken
        (["bench", "b", "--nonsense"], "--nonsense: satchel bench has no such flag", "satchel bench"),
        (["completion", "bsh"], "did you mean bash?", "satchel completion"),
        (["--threads", "2", "run", "b"], "satchel COMMAND --threads", "satchel"),
        (["run", "b", "the", "quick", "fox"], "'the quick fox'", "satchel run"),
        (["inspect", "a", "b"], "b: satchel inspect takes", "satchel inspect"),
    ],
)
def test_a_wrong_word_gets_a_suggestion_and_the_right_help(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str, help_of: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    assert says in err
    assert err.endswith(f"(see {help_of} --help)\n")


@pytest.mark.parametrize(("error", "says"), [(28, "disk is full"), (13, "permissions")])
def test_an_error_of_the_system_names_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, error: int, says: str
) -> None:
    module = f"def configure(parser): pass\ndef main(args): raise OSError({error}, 'text', 'some/file')\n"
    (tmp_path / f"fails_{error}.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "export", cli.Command(f"fails_{error}", "fails"))
    monkeypatch.setattr(cli, "_drop_output", lambda: None)
    assert cli.main(["export"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("satchel: error: some/file: ")
    assert says in err


def test_satchel_is_a_module_that_python_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "satchel", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("satchel ")


def test_a_checkpoint_in_the_place_of_a_bundle_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF and so on")
    for name in ("hf", "model.gguf"):
        assert cli.main(["inspect", str(tmp_path / name)]) == 2
        err = capsys.readouterr().err
        assert f"{name}: is a checkpoint" in err
        assert "satchel export" in err


def test_a_bundle_in_the_place_of_a_checkpoint_is_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(tiny), "-o", str(tmp_path / "out")]) == 2
    assert f"{tiny}: is already a bundle" in capsys.readouterr().err


def test_an_unreadable_place_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read everything
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert f"{tmp_path}: permission denied" in capsys.readouterr().err


def test_files_written_beside_the_output_are_named(tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = satchel("inspect", tiny, "--html", page)
    assert done.stderr.decode() == f"{page}: written\n"
    assert satchel("inspect", tiny, "--html", page, "--quiet").stderr == b""


def test_more_threads_than_cpus_are_warned_of(tiny: Path) -> None:
    threads = str(usable_cpus() + 1)
    done = satchel("run", tiny, "the cat", "--max-new-tokens", "2", "--threads", threads, "--json")
    assert done.returncode == 0
    assert done.stderr.decode().startswith(f"satchel: --threads {threads}: ")
    assert done.stderr.count(b"\n") == 1
