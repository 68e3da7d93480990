"""The command line: what goes to standard output and to standard error, and the exit codes."""

from __future__ import annotations

import io
import itertools
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.command import Satchel
from support.tiny_bundle import change_manifest, write_bundle

from satchel.runtime.cli import main as cli
from satchel.runtime.generation.generator import Generator
from satchel.runtime.util.cpu import usable_cpus

COMMAND = [sys.executable, "-m", "satchel.runtime.cli.main"]


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


def test_run_flushes_each_piece(
    satchel: Satchel, tiny: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []

    class Output(io.StringIO):
        def flush(self) -> None:
            flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Output())
    satchel("run", tiny, "the cat sat", "--max-new-tokens", 20, "--threads", 1)
    with generator.stream("the cat sat", 20) as stream:
        assert flushed[:3] == list(itertools.accumulate(stream))[:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "x"], "nowhere: no such file or folder"),
        (["TINY", "x", "--max-context", "65"], "--max-context 65: this bundle allows 1 to 64"),
        (["TINY", "x", "--max-new-tokens", "-1"], "--max-new-tokens -1: must be 0 or more"),
        (["TINY", "x", "--threads", "0"], "--threads 0: there must be at least 1 thread"),
        (["TINY", "x", "--provider", "tpu"], "--provider tpu: unknown: choose one of cpu"),
        (["TINY", "x" * 200], "tokens but the context holds 64: shorten the prompt or raise --max-context"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    satchel: Satchel, tiny: Path, arguments: list[str], message: str
) -> None:
    assert message in satchel.refuses("run", *(tiny if word == "TINY" else word for word in arguments))


def test_a_prompt_may_stand_behind_flags(satchel: Satchel, tiny: Path) -> None:
    flags = ("--max-new-tokens", 5)
    assert satchel("run", tiny, "--quiet", "the cat", *flags) == satchel("run", tiny, "--quiet", *flags, "the cat")
    for words in ((*flags, "the", "cat"), ("the", *flags, "cat"), ("x", "--nothing")):
        assert "satchel run --help" in satchel.refuses("run", tiny, *words)


def test_wrong_arguments_are_one_line_and_exit_code_2(satchel: Satchel) -> None:
    for arguments in ([], ["run"], ["frobnicate"], ["run", "b", "p", "--max-new-tokens", "many"]):
        assert re.fullmatch(r".* \(see satchel.* --help\)", satchel.refuses(*arguments))


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


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Puts other code in the place of `satchel export`."""

    def make(code: str) -> None:
        name = f"command_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(f"def configure(parser): pass\ndef main(args): {code}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(cli.COMMANDS, "export", cli.Command(name, "stands for another"))

    return make


def test_a_missing_package_of_the_exporter_says_what_to_install(
    satchel: Satchel, command: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    command("import onnxscript.missing")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    said = satchel.refuses("export")
    assert said.startswith("onnxscript is not installed: pip install 'onnxscript")
    assert "satchel[" not in said


def test_another_missing_module_is_not_hidden(satchel: Satchel, command: Callable[[str], None]) -> None:
    command("import no_such_module_here")
    with pytest.raises(ModuleNotFoundError, match="no_such_module_here"):
        satchel("export")


@pytest.mark.parametrize(("error", "says"), [(28, "disk is full"), (13, "permissions")])
def test_an_error_of_the_system_names_the_file(
    satchel: Satchel, command: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, error: int, says: str
) -> None:
    command(f"raise OSError({error}, 'text', 'some/file')")
    monkeypatch.setattr(cli, "_drop_output", lambda: None)
    said = satchel.refuses("export")
    assert said.startswith("some/file: ")
    assert says in said


def test_an_error_that_names_what_a_bundle_says_moves_no_cursor(satchel: Satchel, tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "bundle"))
    change_manifest(folder, "model", "\x1b[2J\nsatchel: fine", to=1)
    assert r"unknown key 'model.\x1b[2J\nsatchel: fine'" in satchel.refuses("inspect", folder)


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
    satchel: Satchel, arguments: list[str], says: str, help_of: str
) -> None:
    said = satchel.refuses(*arguments)
    assert says in said
    assert said.endswith(f"(see {help_of} --help)")


def test_satchel_is_a_module_that_python_runs() -> None:
    done = subprocess.run([sys.executable, "-m", "satchel", "--version"], capture_output=True, text=True, check=True)
    assert (done.stdout.split()[0], done.stderr) == ("satchel", "")


def test_a_checkpoint_in_the_place_of_a_bundle_is_named(satchel: Satchel, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF and so on")
    for name in ("hf", "model.gguf"):
        said = satchel.refuses("inspect", tmp_path / name)
        assert f"{name}: is a checkpoint" in said
        assert "satchel export" in said


def test_an_unreadable_place_is_named(satchel: Satchel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may read everything
    assert f"{tmp_path}: permission denied" in satchel.refuses("inspect", tmp_path)


def test_files_written_beside_the_output_are_named(satchel: Satchel, tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert satchel("inspect", tiny, "--html", page).err == f"{page}: written\n"
    assert satchel("inspect", tiny, "--html", page, "--quiet").err == ""


def test_more_threads_than_cpus_are_warned_of(tiny: Path) -> None:
    """In a process of its own: one with a pool of threads."""
    threads = str(usable_cpus() + 1)
    command = [*COMMAND, "run", str(tiny), "the cat", "--max-new-tokens", "2", "--threads", threads, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.startswith(f"satchel: --threads {threads}: ")
    assert done.stderr.count("\n") == 1
