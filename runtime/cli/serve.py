"""`satchel serve`: an HTTP server with the protocols of OpenAI and Anthropic."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from satchel.runtime.cli import custom_flags, provider_flags, ready, run_flags
from satchel.runtime.errors import PromptError
from satchel.runtime.util.defaults import BATCH_ROWS, PREFIX_CACHE_MIB

if TYPE_CHECKING:
    from satchel.runtime.generation.generator import Generator

MIB = 1 << 20
PORT, QUEUE, MAX_BODY_MIB, CONTEXT = 8080, 64, 16, 8192


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel serve`."""
    parser.description = (
        "Serve models over HTTP, with the protocols of OpenAI and Anthropic. The first model is loaded at once, others "
        "when they are first asked for. Ctrl-C or SIGTERM lets running requests end; a second one does not."
    )
    parser.epilog = "example:\n  satchel serve out/smollm2-int8 --port 8080"
    parser.add_argument(
        "bundles",
        metavar="BUNDLE",
        nargs="+",
        help="a bundle or a checkpoint, as for run; NAME=BUNDLE names the model (default: the name of its folder)",
    )
    group = parser.add_argument_group("network")
    group.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on")
    group.add_argument("--port", metavar="N", type=int, default=PORT, help="port to listen on; 0 takes a free one")
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help="the key that requests must have (default: the environment variable SATCHEL_API_KEY, or none)",
    )
    group.add_argument(
        "--cors-origin",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="let pages of this origin ask, such as http://localhost:3000; may be repeated",
    )
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--batch", metavar="N", type=int, default=BATCH_ROWS, help="requests of a model that run at a time"
    )
    group.add_argument("--queue", metavar="N", type=int, default=QUEUE, help="requests of a model that wait")
    group.add_argument("--timeout", metavar="SECONDS", type=float, help="end a request after this time, queue included")
    group.add_argument("--max-body", metavar="MIB", type=float, default=MAX_BODY_MIB, help="largest body of a request")
    group.add_argument(
        "--max-context",
        metavar="N",
        type=int,
        help=f"maximum positions of prompt and new text (default: the bundle's, at most {CONTEXT})",
    )
    group.add_argument(
        "--memory-limit", metavar="MIB", type=int, help="let unused models go before models take more than this"
    )
    group.add_argument(
        "--prefix-cache-mib", metavar="MIB", type=int, default=PREFIX_CACHE_MIB, help="size of a model's prefix cache"
    )
    run_flags.add_kv_cache(group)
    parser.add_argument("--log-prompts", action="store_true", help="write prompts into the log")
    provider_flags.add_threads(parser)
    ready.add_flag(parser)
    ready.add_speculation(parser)
    custom_flags.add_flags(parser)
    provider_flags.add_flags(parser)


def main(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    _check(args)
    from satchel.runtime.server.models import Models
    from satchel.runtime.server.records import Metrics
    from satchel.runtime.server.run import listen, make_server
    from satchel.runtime.server.settings import Settings
    from satchel.runtime.server.state import State

    paths = _named(args.bundles)
    settings = Settings(
        rows=args.batch,
        queue=args.queue,
        max_body=round(args.max_body * MIB),
        timeout=args.timeout,
        api_key=args.api_key or os.environ.get("SATCHEL_API_KEY") or None,
        cors_origins=tuple(args.cors_origin),
        kv_cache_mib=args.kv_cache_mib,
        memory_limit=None if args.memory_limit is None else args.memory_limit * MIB,
        log_prompts=args.log_prompts,
        quiet=args.quiet,
    )
    models = Models(paths, lambda path: _open(args, path), settings)
    listener = listen(args.host, args.port)
    try:
        models.load_first()
        server = make_server(State(models, settings, Metrics()), args.host)
        host, port = listener.getsockname()[:2]
        if not args.quiet:
            shown = f"[{host}]" if ":" in host else host
            print(f"serving {', '.join(paths)} at http://{shown}:{port}", file=sys.stderr, flush=True)
        server.run([listener])
    finally:
        models.close(drain=False)
        listener.close()
    return 0


def _check(args: argparse.Namespace) -> None:
    least = {"batch": 1, "queue": 0, "port": 0, "max_body": 0, "memory_limit": 1, "kv_cache_mib": 1, "timeout": 0}
    for name, low in least.items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if value is not None and not low <= value < float("inf"):
            raise PromptError(f"{flag} {value}: must be a number, {low} or more")
    if args.timeout == 0:
        raise PromptError("--timeout 0: must be above 0")
    if args.port > 65535:
        raise PromptError(f"--port {args.port}: must be from 0 to 65535")


def _named(arguments: list[str]) -> dict[str, str]:
    """The paths of the bundles by the names of their models. Raises PromptError for a name that two have."""
    paths: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or os.path.exists(argument):
            name, path = Path(argument).resolve().name, argument
        if not name or not path:
            raise PromptError(f"{argument}: must be BUNDLE or NAME=BUNDLE")
        if name in paths:
            raise PromptError(f"{argument}: another bundle is called {name} too: give it a name, as NAME={path}")
        paths[name] = path
    return paths


def _open(args: argparse.Namespace, path: str) -> Generator:
    generator = ready.open_generator(argparse.Namespace(**{**vars(args), "bundle": path}), args.prefix_cache_mib)
    if args.max_context is None:
        generator.max_context = min(CONTEXT, generator.max_context)
    return generator
