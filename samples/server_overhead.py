"""Times requests that run at once, asked of the scheduler and asked of the server over HTTP, by turns.

    python samples/server_overhead.py BUNDLE [--requests 8] [--prompt-tokens 128] [--new-tokens 128] [--rounds 5]

Prompts are random tokens, and answers are streams, without drafts, which the answers to the same prompts before would
give. The scheduler takes a round's requests when all of them wait: how it feeds their prompts would else depend on when
each arrives, and the time even more. The client of the server is a process of its own on the same processor, so its
work is part of the overhead.
"""

from __future__ import annotations

import argparse
import json
import queue
import random
import selectors
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from satchel.runtime import Generator
from satchel.runtime.generation.events import Event
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.request import Request
from satchel.runtime.generation.scheduler import Scheduler
from satchel.runtime.server.models import Models
from satchel.runtime.server.records import Metrics
from satchel.runtime.server.run import listen, make_server
from satchel.runtime.server.settings import Settings
from satchel.runtime.server.state import State


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    draw = random.Random(0)
    settings = Settings(rows=args.requests, quiet=True)
    models = Models({"m": args.bundle}, lambda path: _open(path, args), settings)
    models.load_first()
    model = models.loaded["m"]
    listener = listen("127.0.0.1", 0)
    server = make_server(State(models, settings, Metrics()), "127.0.0.1")
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    client = subprocess.Popen([sys.executable, __file__, "--client", str(listener.getsockname()[1])],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
    limits = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    asked = {"max_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    ratios = []
    try:
        for number in range(-1, args.rounds):  # round -1 is a warm-up
            vocabulary = model.generator.engine.vocabulary
            prompts = [
                [draw.randrange(100, vocabulary) for _ in range(args.prompt_tokens)] for _ in range(args.requests)
            ]
            engine = _ask_scheduler(model.scheduler, [Request(ids, GenerationOptions(**limits)) for ids in prompts])
            bodies = [{"prompt": ids, "stream": True, **asked} for ids in prompts]
            served = _ask_server(model.scheduler, client, bodies)
            if number >= 0:
                ratios.append(served / engine)
                print(f"scheduler {engine:.3f} s, server {served:.3f} s: {100 * (ratios[-1] - 1):+.1f} %", flush=True)
        print(f"overhead of the server: {100 * (statistics.median(ratios) - 1):+.1f} % (median of {args.rounds})")
    finally:
        client.kill()
        server.should_exit = True
        thread.join()
        listener.close()


def _open(path: str, args: argparse.Namespace) -> Generator:
    context = args.prompt_tokens + args.new_tokens
    return Generator.open(path, threads=args.threads, prefix_cache_mib=0, max_context=context, speculate="off")


def _ask_scheduler(scheduler: Scheduler, requests: list[Request]) -> float:
    """The seconds until all have ended."""
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with _held(scheduler, len(requests)):
        begun, left = time.perf_counter(), len(requests)
        for request in requests:
            scheduler.submit(request, events.put)
    while left:
        outcome = events.get().outcome
        if isinstance(outcome, Exception):
            raise outcome
        left -= outcome is not None
    return time.perf_counter() - begun


def _ask_server(scheduler: Scheduler, client: subprocess.Popen[str], bodies: list[dict[str, Any]]) -> float:
    """The seconds that the client measures."""
    with _held(scheduler, len(bodies)):
        print(json.dumps(bodies), file=client.stdin, flush=True)
    return float(client.stdout.readline())


@contextmanager
def _held(scheduler: Scheduler, count: int) -> Iterator[None]:
    """Hold the scheduler until `count` requests wait, which begin together then."""
    stands, go = threading.Event(), threading.Event()

    def hold(event: Event) -> None:
        stands.set()
        go.wait()

    scheduler.submit(Request([1], GenerationOptions(max_new_tokens=1)), hold)
    stands.wait()
    try:
        yield
        while scheduler.waiting < count:
            time.sleep(1e-4)
    finally:
        go.set()


def ask_all(port: int) -> None:
    """Read lists of bodies, send each as a request of its own at once, and print the seconds until all have ended."""
    for line in sys.stdin:
        contents = [json.dumps(body).encode() for body in json.loads(line)]
        begun = time.perf_counter()
        _read_all([_send(port, content) for content in contents])
        print(time.perf_counter() - begun, flush=True)


def _send(port: int, content: bytes) -> socket.socket:
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Connection: close", f"Content-Length: {len(content)}"]
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall("\r\n".join([*lines, "\r\n"]).encode() + content)
    return connection


def _read_all(connections: list[socket.socket]) -> None:
    """Read each stream as it comes, in one thread, until all have ended."""
    last = dict.fromkeys(connections, b"")
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection, selectors.EVENT_READ, connection)
        while selector.get_map():
            for key, _ in selector.select():
                connection = key.data
                block = connection.recv(1 << 16)
                last[connection] = (last[connection] + block)[-100:]
                if not block:
                    selector.unregister(connection)
                    connection.close()
    for end in last.values():
        if b"[DONE]" not in end:
            raise RuntimeError(f"a stream did not end well: {end!r}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--client"]:
        ask_all(int(sys.argv[2]))
    else:
        main()
