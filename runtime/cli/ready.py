"""What happens before `run` and `chat` open BUNDLE: a checkpoint is exported, and a bundle specialized if asked to."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from satchel.runtime.bundle import user_cache
from satchel.runtime.bundle.recognize import is_checkpoint, is_made_by_satchel
from satchel.runtime.cli import custom_flags
from satchel.runtime.errors import SatchelError
from satchel.runtime.util import requirements
from satchel.runtime.util.child_path import python_path


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Add --specialize and --no-specialize."""
    parser.add_argument(
        "--specialize",
        action=argparse.BooleanOptionalAction,
        help="make the bundle ready for this machine before anything else, or not at all (default: in the background "
        "when it is first used)",
    )


def make_ready(args: argparse.Namespace) -> None:
    """Export BUNDLE where it is a checkpoint, and specialize it first where --specialize is given.

    `args.bundle` is then the bundle. Raises SatchelError, and SystemExit where an export ends with an error of its own.
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
    """The bundle of a checkpoint in the user's cache, exported by the defaults of `satchel export` if it is not there.

    A checkpoint that was changed, or another version of satchel, is exported anew.
    """
    name = _cache_name(checkpoint)
    found = user_cache.find(name)
    if found is not None:
        return found
    if requirements.missing("export"):
        raise SatchelError(
            f"{checkpoint}: is a checkpoint, and to export it packages are missing: "
            f"{requirements.install_command('export')}"
        )
    output = user_cache.bundles_folder() / name
    if not quiet:
        print(f"satchel: exporting {checkpoint} to {output}; later runs start from there", file=sys.stderr)
    code = _export(checkpoint, output, ["--quiet"] if quiet else [])
    if code != 0 and not is_made_by_satchel(output):  # another process may have exported it meanwhile
        raise SystemExit(code)
    user_cache.evict(keep=name)
    return output


def _cache_name(checkpoint: Path) -> str:
    """A name that is another one for each checkpoint, its files as they are now, and each version of satchel."""
    import hashlib
    import json
    from importlib.metadata import version

    path = checkpoint.resolve()
    files = sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]
    states = [(str(each), each.stat().st_size, each.stat().st_mtime_ns) for each in files]
    key = hashlib.sha256(json.dumps([version("satchel"), states]).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"exported-{re.sub(r'[^A-Za-z0-9._-]', '_', path.stem if path.is_file() else path.name)[:60]}-{key}"


def _export(checkpoint: Path, output: Path, flags: list[str]) -> int:
    """Run `satchel export` in a process of its own, whose memory is free again when the model runs: its exit code."""
    import signal
    import subprocess

    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "satchel.runtime.cli.main", "export", str(checkpoint), "-o", str(output), *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": python_path()},
        start_new_session=True,  # it is told once of Ctrl-C, here, and then removes what is half made
    )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        code = process.wait()
    return code if code >= 0 else 128 - code
