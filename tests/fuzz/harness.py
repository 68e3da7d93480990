"""Runs mutants, each in a child forked from this process under limits, and says how each ended."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fuzz.mutants import KINDS
from fuzz.trial import RUN, Trial

from satchel.runtime.cli import main as cli

MEMORY = 6 << 30  # bytes of address space: ONNX Runtime reserves much more than it uses
FILE_SIZE = 64 << 20
CPU_SECONDS = 20
SECONDS = 60.0  # a machine may be busy

ESCAPED = 99
"""The exit code of a child in which an exception got through."""

GOOD = ("ran", "refused", "died")
"""Endings that are allowed; a death is of ONNX Runtime, whose parser is not ours, and is listed."""

DEATHS = (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)


@dataclass(frozen=True)
class Ending:
    """How a mutant ended: one of `GOOD`, or what went wrong; `said` is the end of its standard error."""

    index: int
    kind: str
    note: str
    how: str
    said: str


def prepare(folder: Path) -> list[Path]:
    """Load what children need, and write the good bundles that are changed, each with a saved state beside it.

    Returns the bundles: one whose layers attend, and one of which some keep states of fixed size.
    """
    import numpy  # noqa: F401 - loaded here, once, for all children
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401
    from support.chat_bundle import CONTEXT, END, TEMPLATE, chat_tokenizer, write_chat_bundle
    from support.tiny_hybrid import write_hybrid

    from satchel.runtime.bundle.signature import new_key_pair

    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "SATCHEL_SPECIALIZE": "off"}  # no process works on after a child
    new_key_pair(folder / "key")
    hybrid = write_hybrid(
        folder / "hybrid", tokenizer=chat_tokenizer(), eos_token_ids=(END,), max_context=CONTEXT,
        companions={"chat_template.jinja": TEMPLATE.encode()},
    )  # fmt: skip
    bundles = [write_chat_bundle(folder / "good"), hybrid]
    for bundle in bundles:
        command, *flags = RUN  # in a process of its own: children must not be forked beside threads of ONNX Runtime
        state = ("--save-state", str(state_of(bundle)))
        subprocess.run([sys.executable, "-m", "satchel", command, str(bundle), *flags, *state], check=True)
    return bundles


def state_of(bundle: Path) -> Path:
    """Where the saved state of a good bundle lies."""
    return bundle.with_suffix(".state")


def run_mutants(bundles: list[Path], scratch: Path, seed: int, indices: range) -> Iterator[Ending]:
    """Make, run and judge the mutants of these numbers; each depends on the seed and its number alone."""
    names = list(KINDS)
    for index in indices:
        rng = random.Random(f"{seed}/{index}")
        make = rng.choices(names, list(KINDS.values()))[0]
        good = rng.choice(bundles)
        place = scratch / "place"
        shutil.rmtree(place, ignore_errors=True)
        for name in ("outside", "out", "tmp", "cache", "cwd"):
            (place / name).mkdir(parents=True)
        (place / "outside" / "secret").write_bytes(b"secret")
        shutil.copyfile(good.parent / "key.pub", place / "key.pub")
        shutil.copyfile(state_of(good), place / "talk.state")
        trial = make(rng, Path(shutil.copytree(good, place / "bundle")))
        before = snapshot(place)
        how, said = run_child(trial, place)
        if how in GOOD and snapshot(place) != before:
            how = "changed files outside its scratch folder"
        yield Ending(index, make.__name__, f"{good.name}: {trial.note}", how, said)


def snapshot(place: Path) -> dict[str, tuple[int, ...]]:
    """All that lies in a place but what a child may write: kind, size and times by path."""
    found = {}
    for folder, folders, files in os.walk(place):
        if Path(folder) == place:
            for name in ("out", "tmp", "cache"):
                folders.remove(name)
            files = [name for name in files if name not in ("stdout", "stderr")]
        for name in (*folders, *files):
            status = os.lstat(os.path.join(folder, name))
            times = () if name in folders else (status.st_size, status.st_mtime_ns)
            found[os.path.join(folder, name)] = (status.st_mode, *times)
    return found


def run_child(trial: Trial, place: Path) -> tuple[str, str]:
    """Run a trial's command in a fork; how it ended, and the end of what it said."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = ESCAPED
        try:
            os.setsid()
            code = _in_child(trial, place)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else ESCAPED
        except BaseException:  # noqa: BLE001 - whatever it is, it must be seen, and must not reach the parent's code
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = _wait(child)
    said = (place / "stderr").read_text("utf-8", "replace")
    return judge(status, said), said[-600:]


def judge(status: int | None, said: str) -> str:
    """What a child's status and its standard error amount to."""
    if status is None:
        return "hung"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "died" if number in DEATHS else f"signal {number}"
    code = os.WEXITSTATUS(status)
    if code == ESCAPED or "Traceback" in said:
        return "let an exception through"
    if code == cli.EXIT_INPUT:
        return "refused" if said.count("satchel: error: ") == 1 else "refused without a word"
    return "ran" if code in (0, 1) else f"exit code {code}"


def _in_child(trial: Trial, place: Path) -> int:
    for name, flags in (("stdout", 1), ("stderr", 2)):
        descriptor = os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, flags)
    read, write = os.pipe()
    os.write(write, b"hello\n")
    os.close(write)
    os.dup2(read, 0)
    sys.stdin, sys.stdout, sys.stderr = (
        open(0, encoding="utf-8"),  # noqa: SIM115
        open(1, "w", encoding="utf-8"),  # noqa: SIM115
        open(2, "w", encoding="utf-8", errors="backslashreplace"),  # noqa: SIM115
    )
    os.environ |= {"XDG_CACHE_HOME": str(place / "cache"), "TMPDIR": str(place / "tmp"), "HOME": str(place / "tmp")}
    os.chdir(place / "cwd")
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    command, *rest = trial.command
    return cli.main([command, str(trial.path), *rest])


def _wait(child: int) -> int | None:
    """The status of a child, or None for one that had to be stopped."""
    end, pause = time.monotonic() + SECONDS, 0.0005
    while time.monotonic() < end:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return status
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def table(endings: list[Ending]) -> str:
    """How many mutants of each kind ended how."""
    counts = Counter((ending.kind, ending.how) for ending in endings)
    hows = sorted({ending.how for ending in endings}, key=lambda how: (how not in GOOD, how))
    rows = [["kind", *hows]]
    rows += [[kind, *(str(counts[kind, how]) for how in hows)] for kind in sorted({kind for kind, _ in counts})]
    rows += [["all", *(str(sum(ending.how == how for ending in endings)) for how in hows)]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(hows) + 1)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
