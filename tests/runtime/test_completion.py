"""`satchel completion`: the scripts complete what the parsers take, in the shells that are here."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import Satchel

from satchel.export.config import KV_CACHES, PRECISIONS
from satchel.runtime.cli import main as cli
from satchel.runtime.cli.completion import SHELLS

EXPORTER_ONLY = ["torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "gguf"]

# Sources the script, which is $1, and completes the last of the other arguments.
BASH = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
_shtab_satchel
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a script for each shell, printed where the exporter's packages are not installed."""
    folder = tmp_path_factory.mktemp("scripts")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({[*EXPORTER_ONLY, "numpy", "onnxruntime"]!r}))
from satchel.runtime.cli import main as cli
sys.exit(cli.main(["completion", sys.argv[1]]))
"""
    for shell in SHELLS:
        done = subprocess.run([sys.executable, "-c", code, shell], capture_output=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (0, b"")
        (folder / shell).write_bytes(done.stdout)
    return folder


def need(shell: str) -> str:
    """The path of a shell; skips the test where it is not installed."""
    found = shutil.which(shell)
    if found is None:
        pytest.skip(f"{shell} is not installed")
    return found


def shell_output(*command: str | Path, folder: Path | None = None) -> list[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    return [line for line in done.stdout.splitlines() if line]


def completed(scripts: Path, line: str, folder: Path | None = None) -> list[str]:
    """What bash offers for the last word of a command line."""
    words = line.split(" ")
    return shell_output(need("bash"), "--norc", "-c", BASH, "bash", scripts / "bash", *words, folder=folder)


def flags(name: str) -> set[str]:
    """All flags of a command, as its own parser has them."""
    (commands,) = (
        action for action in cli.build_parser([name])._actions if isinstance(action, argparse._SubParsersAction)
    )
    return {flag for action in commands.choices[name]._actions for flag in action.option_strings}


def test_bash_completes_commands(scripts: Path) -> None:
    assert completed(scripts, "satchel ") == list(cli.COMMANDS)
    assert completed(scripts, "satchel e") == ["export", "embed", "eval"]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_bash_completes_the_flags_of_every_command(scripts: Path, name: str) -> None:
    assert set(completed(scripts, f"satchel {name} -")) == flags(name)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("satchel completion ", SHELLS),
        ("satchel specialize b --kernels ", ("auto", "satchel", "onnxruntime")),
        ("satchel export model --precision ", PRECISIONS),
        ("satchel export model --kv-cache ", KV_CACHES),
        ("satchel run b --provider c", ("cpu", "cuda", "cann")),
        ("satchel run b --max-new-tokens ", ()),
        ("satchel run b --max-new", ("--max-new-tokens",)),
    ],
)
def test_bash_completes_choices(scripts: Path, line: str, expected: tuple[str, ...]) -> None:
    assert completed(scripts, line) == list(expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("satchel run ", {"bundle"}),
        ("satchel eval b", {"bundle"}),
        ("satchel export ", {"bundle", "book.txt"}),
        ("satchel export model -o b", {"bundle"}),
        ("satchel eval bundle --text b", {"bundle", "book.txt"}),
        ("satchel eval bundle --reference b", {"bundle", "book.txt"}),
        ("satchel export model --calibrate b", {"bundle", "book.txt"}),
        ("satchel run bundle --load-state b", {"bundle", "book.txt"}),
        ("satchel chat bundle --system ", set()),
    ],
)
def test_bash_completes_paths(scripts: Path, tmp_path: Path, line: str, expected: set[str]) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "book.txt").touch()
    assert set(completed(scripts, line, tmp_path)) == expected


def test_zsh_takes_its_script(scripts: Path) -> None:
    shell_output(need("zsh"), "-f", "-n", scripts / "zsh")


def test_fish_completes_commands_flags_and_choices(scripts: Path) -> None:
    fish = need("fish")

    def offered(line: str) -> list[str]:
        code = "source $argv[1]; complete --do-complete $argv[2]"
        lines = shell_output(fish, "--no-config", "-c", code, scripts / "fish", line)
        return [line.split("\t")[0] for line in lines]

    assert set(offered("satchel ")) == set(cli.COMMANDS)
    assert offered("satchel run b --max-new") == ["--max-new-tokens"]
    assert set(offered("satchel export model --precision ")) == set(PRECISIONS)


def test_an_unknown_shell_is_one_line_and_exit_code_2(satchel: Satchel) -> None:
    said = satchel.refuses("completion", "tcsh")
    assert all(word in said for word in ("tcsh", *SHELLS))


def test_only_the_command_itself_imports_the_library(tiny: Path) -> None:
    code = (
        "import sys; from satchel.runtime.cli import main as cli; cli.main(sys.argv[1:]); print('shtab' in sys.modules)"
    )
    assert shell_output(sys.executable, "-c", code, "inspect", tiny)[-1] == "False"
