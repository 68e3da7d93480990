"""The flags for threads and execution providers, of all commands that run a bundle. Standard library only."""

from __future__ import annotations

import argparse

from satchel.runtime.errors import PromptError
from satchel.runtime.ort.providers import PROVIDERS, ProviderChoice
from satchel.runtime.util.defaults import PROVIDER


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --provider, --provider-option and --strict."""
    group = parser.add_argument_group("device")
    group.add_argument(
        "--provider", default=PROVIDER, help=f"execution provider: {', '.join(PROVIDERS)} (default %(default)s)"
    )
    group.add_argument(
        "--provider-option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a provider option, such as device_id=1; repeatable",
    )
    group.add_argument("--strict", action="store_true", help="fail if part of a graph would run on another provider")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """Add --threads."""
    parser.add_argument("-t", "--threads", metavar="N", type=int, help="CPU threads (default: one per physical core)")


def choice_of(args: argparse.Namespace) -> ProviderChoice:
    """The provider that a parsed command line chose.

    Raises PromptError for an option that is not KEY=VALUE or is given twice with different values, ProviderError for an
    unknown provider or option.
    """
    options: dict[str, str] = {}
    for given in args.provider_option:
        key, equals, value = given.partition("=")
        if not equals or not key:
            raise PromptError(f"--provider-option {given}: must be KEY=VALUE, such as device_id=1")
        if options.setdefault(key, value) != value:
            raise PromptError(f"--provider-option {key}: given as {options[key]} and as {value}: leave one out")
    choice = ProviderChoice(args.provider, options, args.strict)
    choice.check()
    return choice
