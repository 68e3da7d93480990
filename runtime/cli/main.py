"""The `satchel` command: finds the subcommand, imports only that, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TextIO

from satchel.runtime.errors import SatchelError, SatchelWarning
from satchel.runtime.util.terminal import printable

EXIT_INPUT, EXIT_INTERRUPTED = 2, 130

# What `pip install 'satchel[export]'` brings: a missing one is the user's to install, not a fault.
EXPORT_PACKAGES = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors", "gguf", "threadpoolctl")

# What satchel itself needs; a packed bundle comes to where some of it may be missing.
RUNTIME_PACKAGES = ("numpy", "onnxruntime", "tokenizers", "sentencepiece", "jinja2", "tqdm", "shtab")

INSTALLED_BY = dict.fromkeys(EXPORT_PACKAGES, "'satchel[export]'") | {name: name for name in RUNTIME_PACKAGES}


@dataclass(frozen=True)
class Command:
    """A subcommand: the module that has its `configure` and `main`, its line in the list, and if it opens a bundle."""

    module: str
    help: str
    opens: bool = True


COMMANDS = {
    "export": Command("satchel.export.cli.export", "compile a checkpoint into a bundle (needs satchel[export])", False),
    "sensitivity": Command(
        "satchel.export.cli.sensitivity", "find the layers that need 8 bits (needs satchel[export])", False
    ),
    "check": Command(
        "satchel.export.cli.check", "tell what an execution provider takes of a bundle (needs satchel[export])"
    ),
    "run": Command("satchel.runtime.cli.run", "continue a prompt, or many"),
    "chat": Command("satchel.runtime.cli.chat", "talk with a model"),
    "specialize": Command("satchel.runtime.cli.specialize", "make a bundle ready for this machine"),
    "bench": Command("satchel.runtime.cli.bench", "measure the speed and memory of a bundle"),
    "eval": Command("satchel.runtime.cli.eval", "measure how close a bundle is to a reference on a text"),
    "inspect": Command("satchel.runtime.cli.inspect", "show what is in a bundle"),
    "profile": Command("satchel.runtime.cli.profile", "show where the time of a bundle goes"),
    "verify": Command("satchel.runtime.cli.verify", "replay what a bundle was certified for, on this machine"),
    "pack": Command("satchel.runtime.cli.pack", "put a bundle and the runner into one file"),
    "unpack": Command("satchel.runtime.cli.unpack", "make a folder of a packed bundle again"),
    "sign": Command("satchel.runtime.cli.sign", "sign a bundle, or make a key (needs satchel[sign])", False),
    "completion": Command("satchel.runtime.cli.completion", "let a shell complete commands, flags and paths", False),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_INPUT, f"satchel: error: {message} (see {self.prog} --help)\n")


class HelpFormatter(argparse.HelpFormatter):
    """Wraps a text of one line, and leaves one of several lines, such as an example, as it is."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


class ShowVersion(argparse.Action):
    """Prints the installed version; it is looked up only when asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from importlib.metadata import version

        print(f"satchel {version('satchel')}")
        parser.exit()


def build_parser(arguments: Sequence[str]) -> Parser:
    """The parser, in which only the subcommand that `arguments` name has its options: the others are not imported."""
    return _build([argument for argument in arguments if argument in COMMANDS][:1])


def build_full_parser() -> Parser:
    """The parser, in which every subcommand has its options."""
    return _build(COMMANDS)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """A command line as a namespace; what is wrong with it is one line, and exit code 2."""
    parser = build_parser(arguments)
    args, rest = parser.parse_known_args(arguments)
    # argparse settles an optional PROMPT where the first flag comes, and then knows no place for one behind it.
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(args, "prompt", "") is None:
        args.prompt = rest.pop()
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line. Returns 0 (done), 1 (a check failed), 2 (wrong input; one line says what) or 130 (Ctrl-C)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")
    try:
        args = parse(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if args.quiet else "always", SatchelWarning)
            warnings.showwarning = _show_warning
            code: int = importlib.import_module(COMMANDS[args.command].module).main(args)
        sys.stdout.flush()
        return code
    except SatchelError as error:
        print(f"satchel: error: {printable(str(error))}", file=sys.stderr)  # names out of a bundle may be in it
        return error.exit_code
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in INSTALLED_BY:
            raise
        print(f"satchel: error: {package} is not installed: pip install {INSTALLED_BY[package]}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print("satchel: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and error.errno != errno.ENOSPC:
            raise
        # The interpreter flushes standard output once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0  # whoever read the output has had enough
        print("satchel: error: standard output cannot be written: the disk is full: free some space", file=sys.stderr)
        return EXIT_INPUT


def _build(chosen: Collection[str]) -> Parser:
    parser = Parser(
        prog="satchel",
        description="Compile a language model into a bundle, a folder that ONNX Runtime alone can run, and run it "
        "offline. satchel COMMAND --help explains a command and its flags, with an example.",
        epilog="example: satchel run out/smollm2-fp32 'The capital of France is'",
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the version and exit")
    _add_common(parser, default=False)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help, formatter_class=HelpFormatter)
        if name in chosen:
            importlib.import_module(command.module).configure(subparser)
            _add_common(subparser, default=argparse.SUPPRESS)
            if command.opens:
                _add_trust(subparser)
    return parser


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    satchels = issubclass(category, SatchelWarning)
    ours = f"satchel: {printable(str(message))}\n"
    text = ours if satchels else warnings.formatwarning(message, category, filename, lineno, line)
    print(text, file=file or sys.stderr, end="")


def _add_common(parser: argparse.ArgumentParser, default: Any) -> None:
    parser.add_argument("--verbose", action="store_true", default=default, help="show ONNX Runtime's own log")
    parser.add_argument("--quiet", action="store_true", default=default, help="no progress and no figures")


def _add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the flag of all commands that open BUNDLE; they hand it to `open_bundle`."""
    parser.add_argument(
        "--require-signature",
        metavar="KEY.pub",
        help="refuse BUNDLE unless it is signed with the private key of this public key; hash all of its files, and "
        "use no specialized graphs, which are not covered (needs satchel[sign])",
    )


if __name__ == "__main__":
    sys.exit(main())
