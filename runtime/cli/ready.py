"""Prepares BUNDLE for `run` and `chat`: exports a checkpoint, and specializes a bundle with --specialize."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from satchel.runtime.bundle import user_cache
from satchel.runtime.bundle.recognize import is_checkpoint, is_made_by_satchel
from satchel.runtime.cli import custom_flags, provider_flags
from satchel.runtime.errors import SatchelError
from satchel.runtime.util import requirements
from satchel.runtime.util.child import APART, python_path, wait_for
from satchel.runtime.util.defaults import SPECULATE

if TYPE_CHECKING:
    from satchel.runtime.generation.generator import Generator


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add --specialize and --no-specialize."""
    parser.add_argument(
        "--specialize",
        action=argparse.BooleanOptionalAction,
        help="optimize the bundle for this machine first, or never (default: in the background on first use)",
    )


def add_speculation(parser: argparse.ArgumentParser, default: str = SPECULATE) -> None:
    """Add --speculate and --draft."""
    parser.add_argument(
        "--speculate",
        metavar="MODE",
        default=default,
        help="draft the next tokens, and check several in one run: auto (earlier text and --draft), ngram (only "
        "earlier text) or off; the text is the same (default %(default)s)",
    )
    parser.add_argument(
        "--draft", metavar="BUNDLE", help="a bundle of a smaller model with the same tokenizer, which drafts tokens"
    )


def open_generator(args: argparse.Namespace, prefix_cache_mib: int | None) -> Generator:
    """Make BUNDLE ready and open it, with the flags of `run` and `chat`. Raises SatchelError."""
    from satchel.runtime.generation.generator import Generator
    from satchel.runtime.ort import session

    choice = provider_flags.choice_of(args)
    session.prepare_process(args.threads)
    make_ready(args)
    return Generator.open(
        args.bundle,
        provider=choice,
        threads=args.threads,
        max_context=args.max_context,
        prefix_cache_mib=prefix_cache_mib,
        verbose=args.verbose,
        progress=not args.quiet,
        custom=custom_flags.custom_of(args),
        require_signature=args.require_signature,
        specialize=args.specialize is None,
        speculate=args.speculate,
        draft=args.draft,
    )


def make_ready(args: argparse.Namespace) -> None:
    """Export BUNDLE if it is a checkpoint, and specialize it if --specialize is given.

    Sets `args.bundle` to the bundle. Raises SatchelError, and SystemExit if the export fails with its own error.
    """
    if args.require_signature is None and is_checkpoint(Path(args.bundle)):
        args.bundle = str(_exported(Path(args.bundle), quiet=args.quiet))
    if not args.specialize:
        return
    if args.require_signature is not None:
        raise SatchelError("--specialize with --require-signature: no signature covers what it makes: remove one")
    from satchel.runtime.optimize.prepare import prepare
    from satchel.runtime.util.progress import stage_printer

    shown = not args.quiet
    prepare(
        Path(args.bundle),
        threads=args.threads,
        custom=custom_flags.custom_of(args),
        shown=shown,
        progress=stage_printer(shown=shown),
        waiting=lambda: None,
    )


def _exported(checkpoint: Path, *, quiet: bool) -> Path:
    """The bundle of a checkpoint in the user's cache, exported with the defaults of `satchel export` if missing.

    It is exported again if the checkpoint or the version of satchel has changed.
    """
    name = _cache_name(checkpoint)
    found = user_cache.find(name)
    if found is not None:
        return found
    if requirements.missing("export"):
        raise SatchelError(
            f"{checkpoint}: is a checkpoint; exporting it requires more packages: "
            f"{requirements.install_command('export')}"
        )
    output = user_cache.bundles_folder() / name
    if not quiet:
        print(f"satchel: exporting {checkpoint} to {output}; later runs reuse it", file=sys.stderr)
    code = _export(checkpoint, output, ["--quiet"] if quiet else [])
    if code != 0 and not is_made_by_satchel(output):  # another process may have exported it meanwhile
        raise SystemExit(code)
    user_cache.evict(keep=name)
    return output


def _cache_name(checkpoint: Path) -> str:
    """A name that depends on the checkpoint, the state of its files, and the version of satchel."""
    import hashlib
    import json
    from importlib.metadata import version

    path = checkpoint.resolve()
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    states = [(str(each), each.stat().st_size, each.stat().st_mtime_ns) for each in files]
    key = hashlib.sha256(json.dumps([version("satchel"), states]).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"exported-{re.sub(r'[^A-Za-z0-9._-]', '_', path.stem if path.is_file() else path.name)[:60]}-{key}"


def _export(checkpoint: Path, output: Path, flags: list[str]) -> int:
    """Run `satchel export` in a child process, to free its memory before the model runs. Returns the exit code."""
    import subprocess

    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "satchel.runtime.cli.main", "export", str(checkpoint), "-o", str(output), *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": python_path()},
        **APART,  # gets Ctrl-C once, from here, and then removes unfinished files
    )
    return wait_for(process)
