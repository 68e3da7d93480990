"""Ctrl-C at any moment of any command: exit code 130, or 0 where it was done already, and never a traceback."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.chat_bundle import write_chat_bundle
from support.tiny_bundle import VOCABULARY, change_manifest, write_bundle

from satchel.runtime.bundle import strict_json
from satchel.runtime.cli.main import COMMANDS
from satchel.runtime.evaluation.certify import make_certificate
from satchel.runtime.execution.engine import Engine
from satchel.runtime.util import interrupt

# SIGINT is blocked until the handler is there, so that the interpreter's own start is not what is tested.
START = """
import signal, sys
from satchel.runtime.util.interrupt import guarded
from satchel.__main__ import _command

def begin():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    return _command()

sys.exit(guarded(begin))
"""
WORK = {
    "run": ["BUNDLE", "the cat", "--max-new-tokens", "3000"],
    "chat": ["CHATTY"],
    "specialize": ["COPY"],
    "bench": ["BUNDLE", "--prompt-tokens", "50", "--new-tokens", "300", "--bandwidth"],
    "eval": ["BUNDLE", "--text", "TEXT", "--windows", "2", "--window-tokens", "40", "--reference", "BUNDLE"],
    "inspect": ["BUNDLE"],
    "profile": ["BUNDLE", "--prompt-tokens", "20", "--new-tokens", "20"],
    "verify": ["BUNDLE"],
    "doctor": ["BUNDLE"],
    "pack": ["BUNDLE", "-o", "OUT"],
    "unpack": ["PACKED", "-o", "OUT"],
    "sign": ["--new-key", "OUT"],
    "completion": ["bash"],
    "check": ["BUNDLE", "--provider", "cpu"],
    "export": ["FACTORY", "-o", "OUT"],
    "shard": ["BUNDLE", "--tensor-parallel", "2", "-o", "OUT"],
    "plan": ["BUNDLE"],
    "embed": ["VECTORS", "the cat"],
    "serve": ["BUNDLE", "--port", "0", "--quiet", "--no-specialize"],
}
LATEST = 1.5  # seconds; most commands end before


@pytest.fixture(scope="module")
def places(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("interrupt")
    bundle = write_bundle(folder / "bundle", max_context=4096)
    certificate = make_certificate(
        engine, engine.score, None, [np.random.default_rng(2).integers(3, VOCABULARY, 20)], [(0, 4, 4)], skip=4
    )
    change_manifest(bundle, "certificate", to=strict_json.to_json(certificate))
    (folder / "text.txt").write_text("the cat sat on the mat and looked at the other cat. " * 20)
    packed = folder / "packed.pyz"
    subprocess.run([sys.executable, "-m", "satchel", "pack", str(bundle), "-o", str(packed), "--quiet"], check=True)
    factory = Path(__file__).parents[2] / "samples" / "own_module.py"
    chatty = write_chat_bundle(folder / "chatty", max_context=4096)
    return {
        "CHATTY": chatty,
        "BUNDLE": bundle,
        "VECTORS": write_bundle(folder / "vectors", embeddings="mean"),
        "TEXT": folder / "text.txt",
        "PACKED": packed,
        "FACTORY": Path(f"{factory}:build"),
    }


def interrupted(arguments: list[str], delay: float, presses: int = 1) -> tuple[int, str]:
    """The exit code and standard error of a command that gets SIGINT after a delay, as a terminal sends it."""
    block = lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # noqa: E731
    with subprocess.Popen(
        [sys.executable, "-c", START, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=block,
    ) as process:  # fmt: skip
        for _ in range(presses):
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    return process.returncode, err.decode()


def check(name: str, delay: float, places: dict[str, Path], tmp_path: Path, presses: int = 1) -> None:
    arguments = [str(places.get(word, word)) for word in WORK[name]]
    if "COPY" in arguments:
        shutil.copytree(places["BUNDLE"], tmp_path / "copy")
    named = {"COPY": str(tmp_path / "copy"), "OUT": str(tmp_path / "out")}
    code, err = interrupted([name, *(named.get(word, word) for word in arguments)], delay, presses)
    assert code in (0, interrupt.EXIT_INTERRUPTED), err
    assert "Traceback" not in err
    assert "Error" not in err
    if code:
        assert err.endswith(interrupt.MESSAGE)


def test_each_command_is_here() -> None:
    assert set(WORK) == set(COMMANDS)


@pytest.mark.parametrize("name", WORK)
def test_an_interrupt_while_modules_are_imported(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    check(name, random.Random(name).uniform(0.03, 0.3), places, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(8))
@pytest.mark.parametrize("name", WORK)
def test_an_interrupt_at_any_moment(name: str, number: int, places: dict[str, Path], tmp_path: Path) -> None:
    check(name, random.Random(f"{name} {number}").uniform(0.01, LATEST), places, tmp_path)


@pytest.mark.parametrize("name", ["run", "specialize", "export"])
def test_a_second_interrupt_ends_at_once(name: str, places: dict[str, Path], tmp_path: Path) -> None:
    check(name, random.Random(name).uniform(0.1, 0.4), places, tmp_path, presses=2)


def test_an_interrupt_that_an_import_or_cleanup_turns_into_another_error_is_an_interrupt() -> None:
    code = """
import signal, sys
from satchel.runtime.util.interrupt import guarded
def work():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise BufferError("cannot close exported pointers exist") from None
sys.exit(guarded(work))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (interrupt.EXIT_INTERRUPTED, interrupt.MESSAGE)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_that_a_finalizer_swallows_comes_again(name: str) -> None:
    code = f"""
import signal, sys, time
from satchel.runtime.util.interrupt import guarded, handle
class Swallowing:
    def __del__(self):
        signal.raise_signal(signal.{name})
def work():
    handle(signal.SIGTERM)
    Swallowing()
    time.sleep(30)
    return 0
sys.exit(guarded(work))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=20)
    assert (done.returncode, done.stderr) == (interrupt.EXIT_INTERRUPTED, interrupt.MESSAGE)


def test_an_interrupt_during_an_import_comes_after_it(tmp_path: Path) -> None:
    """C++ code that is run by an import may end the process when Python code that it calls raises."""
    (tmp_path / "slow.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\nprint('imported')\n")
    code = """
import sys, time
from satchel.runtime.util.interrupt import guarded
def work():
    import slow
    time.sleep(30)
    return 0
sys.exit(guarded(work))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=20, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (interrupt.EXIT_INTERRUPTED, "imported\n")
    assert done.stderr == interrupt.MESSAGE
