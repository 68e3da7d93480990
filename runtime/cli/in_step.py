"""Commands for ranks that exchange numbers over NCCL: all of them run the same, so that all come to each exchange.

Every rank has all logits and draws the same tokens from them. What depends on time, or on a terminal that one rank has,
cannot run so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

from satchel.runtime.errors import SatchelError
from satchel.runtime.ort.providers import DEVICE_ID

if TYPE_CHECKING:
    from satchel.runtime.execution.ranks.world import World

IN_STEP = ("run", "verify")


def run(args: argparse.Namespace, command: Callable[[argparse.Namespace], int], world: World) -> int:
    """Run a command on this rank as on all others; the first one prints. Returns its exit code.

    Raises SatchelError for a command or flags whose course is not the same on all ranks; the others end with
    SystemExit then.
    """
    reason = _unfit(args)
    if reason is not None:
        if world.rank:
            raise SystemExit(2)
        raise SatchelError(f"{args.bundle}: its ranks run in step, over NCCL: {reason}")
    args.bundle, args.specialize = str(world.folder), False
    if not any(option.startswith(f"{DEVICE_ID}=") for option in args.provider_option):
        args.provider_option = [*args.provider_option, f"{DEVICE_ID}={world.device}"]
    if args.command == "run":
        args.seed = world.agree(secrets.randbits(31) if args.seed is None else args.seed)
    if not world.rank:
        try:
            return command(args)
        finally:
            world.stop()
    args.quiet = True
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        code = command(args)
    world.stop()
    return code


def _unfit(args: argparse.Namespace) -> str | None:
    if args.command not in IN_STEP:
        return f"choose one of {', '.join(IN_STEP)}"
    if args.provider != "cuda":
        return "choose --provider cuda"
    if args.command == "run" and (args.input is not None or (args.prompt is None and args.prompt_flag is None)):
        return "give one prompt on the command line"
    return None
