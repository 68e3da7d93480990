"""The `satchel` command: finds the subcommand, imports only that, and turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import io
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TextIO

from satchel.runtime.errors import SatchelError, SatchelWarning
from satchel.runtime.util import interrupt, requirements
from satchel.runtime.util.terminal import printable

EXIT_INPUT = 2


@dataclass(frozen=True)
class Command:
    """A subcommand: the module that has its `configure` and `main`, its line in the list, and if it opens a bundle."""

    module: str
    help: str
    opens: bool = True


COMMANDS = {
    "export": Command("satchel.export.cli.export", "compile a checkpoint into a bundle", False),
    "plan": Command(
        "satchel.export.cli.plan", "estimate memory and speed before an export, on 1 or more devices", False
    ),
    "shard": Command("satchel.export.cli.shard", "cut a bundle for several devices that run it over MPI"),
    "check": Command("satchel.export.cli.check", "check operator coverage for an execution provider"),
    "run": Command("satchel.runtime.cli.run", "generate text from a prompt or a JSONL file"),
    "chat": Command("satchel.runtime.cli.chat", "chat with a model"),
    "embed": Command("satchel.runtime.cli.embed", "turn texts into vectors"),
    "serve": Command("satchel.runtime.cli.serve", "serve models over HTTP"),
    "specialize": Command("satchel.runtime.cli.specialize", "optimize a bundle for this machine"),
    "bench": Command("satchel.runtime.cli.bench", "measure the speed and memory use of a bundle"),
    "eval": Command("satchel.runtime.cli.eval", "measure accuracy against a reference on a text"),
    "verify": Command("satchel.runtime.cli.verify", "verify accuracy against the recorded reference"),
    "inspect": Command("satchel.runtime.cli.inspect", "show the contents of a bundle"),
    "profile": Command("satchel.runtime.cli.profile", "show the time per operator, layer and node"),
    "doctor": Command("satchel.runtime.cli.doctor", "check the installation, this machine and a bundle", False),
    "pack": Command("satchel.runtime.cli.pack", "pack a bundle and the runner into one file"),
    "unpack": Command("satchel.runtime.cli.unpack", "extract a packed bundle"),
    "sign": Command("satchel.runtime.cli.sign", "sign a bundle, or create a key pair", False),
    "completion": Command("satchel.runtime.cli.completion", "print a shell completion script", False),
}


PACKED_COMMANDS = ("run", "chat", "embed", "verify", "inspect", "specialize", "bench", "profile", "doctor")
"""Commands that a packed file takes as its first argument; without one it is `run`."""


class Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviated flags, and whose errors are one line with a suggestion."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": HelpFormatter, **kwargs})

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_INPUT, f"satchel: error: {printable(message)} (see {self.prog} --help)\n")

    def flags(self) -> list[str]:
        """All flags that this parser takes."""
        return list(self._option_string_actions)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        name = "command" if isinstance(action, argparse._SubParsersAction) else argparse._get_action_name(action)
        choices = f"choose one of {', '.join(known)}"
        self.error(f"{name} {value}: unknown: {_did_you_mean(str(value), known) or choices}")


class HelpFormatter(argparse.HelpFormatter):
    """Wraps a text of one line, but does not change one of several lines, such as an example."""

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


def subparsers(parser: Parser) -> dict[str, Parser]:
    """The parsers of all subcommands, by name."""
    (found,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(found.choices)


def parse(arguments: Sequence[str], packed: str | None = None) -> argparse.Namespace:
    """A command line as a namespace. What is wrong with it is one line, and exit code 2. `packed` as in `main`."""
    parser = build_parser(arguments)
    if packed is not None:
        _describe_packed(arguments[0], subparsers(parser)[arguments[0]], packed)
    first = arguments[0] if arguments else ""
    if first.startswith("-") and first.partition("=")[0] not in parser.flags():
        parser.error(f"{first}: unknown before a command: satchel COMMAND {first}")
    args, rest = parser.parse_known_args(arguments)
    # argparse resolves an optional PROMPT at the first flag, and then accepts none after the flag.
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(args, "prompt", "") is None:
        args.prompt = rest.pop()
    if rest:
        _refuse(subparsers(parser)[args.command], args, rest)
    return args


def main(arguments: Sequence[str] | None = None, packed: str | None = None) -> int:
    """Run a command line. Returns 0 (done), 1 (a check failed), 2 (wrong input; one line says what) or 130 (Ctrl-C).

    `packed` is the name of the packed file that is running, if BUNDLE is that file: help then leaves BUNDLE out.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # the same bytes on all systems
    try:
        args = parse(arguments, packed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if args.quiet else "always", SatchelWarning)
            warnings.showwarning = _show_warning
            command = COMMANDS[args.command]
            run: Callable[[argparse.Namespace], int] = importlib.import_module(command.module).main
            if command.opens:  # others do not need the import
                from satchel.runtime.cli import ranks

                run = ranks.together(args, run)
            code = run(args)
        sys.stdout.flush()
        return code
    except BaseException as error:
        if interrupt.came() or isinstance(error, KeyboardInterrupt):
            print(interrupt.MESSAGE, end="", file=sys.stderr, flush=True)
            if interrupt.came():
                interrupt.end()
            return interrupt.EXIT_INTERRUPTED
        if isinstance(error, BrokenPipeError):  # the reader of the output has closed it
            _drop_output()
            return 0
        message = _message_of(error)
        if message is None:
            raise
        print(f"satchel: error: {printable(message)}", file=sys.stderr)  # names out of a bundle may be in it
        return error.exit_code if isinstance(error, SatchelError) else EXIT_INPUT


def _message_of(error: BaseException) -> str | None:
    """The line that tells the user about an error; None for one that is a fault of the program."""
    if isinstance(error, SatchelError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return requirements.not_installed(error.name or "")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _drop_output()
        return f"{error.filename or 'standard output'}: cannot be written, the disk is full: free some space"
    if isinstance(error, PermissionError) and error.filename is not None:
        return f"{error.filename}: permission denied: check the file's permissions"
    if isinstance(error, MemoryError):
        return "out of memory: close other programs, or use a smaller model, context or precision"
    return None


def _drop_output() -> None:
    """Let the interpreter flush standard output once more at its end, to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(parser: Parser, args: argparse.Namespace, rest: Sequence[str]) -> NoReturn:
    """Exit for unknown arguments, with a suggestion."""
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        flag = unknown[0].partition("=")[0]
        hint = _did_you_mean(flag, parser.flags())
        parser.error(f"{flag}: {parser.prog} has no such flag" + (f": {hint}" if hint else ""))
    if getattr(args, "prompt", None) is not None:
        parser.error(f"the prompt is one argument: put it in quotes: {shlex.quote(' '.join((args.prompt, *rest)))}")
    parser.error(f"{' '.join(rest)}: {parser.prog} takes no such argument")


def _describe_packed(name: str, parser: Parser, file: str) -> None:
    """Write the help of a command as that of a packed file, which is BUNDLE itself; without a command it is run."""
    parser.prog = f"python {file}" if name == "run" else f"python {file} {name}"
    for action in parser._actions:
        if action.metavar in ("BUNDLE", "[BUNDLE]"):
            action.help = argparse.SUPPRESS
    parser.epilog = re.sub(rf"satchel {name} \S+", parser.prog, parser.epilog or "")
    if name == "run":
        parser.description = f"{file} is a language model and the program that runs it. {parser.description}"
        others = "|".join(command for command in PACKED_COMMANDS if command != name)
        parser.epilog += f"\n\nother commands:\n  python {file} {others} --help"


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    begun = [each for each in known if len(word) > 3 and each.startswith(word)]
    close = begun or difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else ""


def _build(chosen: Collection[str]) -> Parser:
    parser = Parser(
        prog="satchel",
        description="Compile a language model into a bundle, a folder that ONNX Runtime alone can run, and run it "
        "offline. satchel COMMAND --help explains a command and its flags, with an example.",
        epilog="example: satchel run out/smollm2-fp32 'The capital of France is'",
    )
    parser.add_argument("--version", action=ShowVersion, nargs=0, help="show the version and exit")
    _add_common(parser, default=False)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help)
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
        help="refuse a bundle that is not signed with the private key of this public key; hash all of its files, and "
        "ignore specialized graphs, which a signature does not cover (needs cryptography)",
    )


if __name__ == "__main__":
    sys.exit(interrupt.guarded(main))
