"""Measures requests that run at once: speed, waiting beside a long prompt, and what a shared prefix saves.

    python samples/many_requests.py BUNDLE [--requests 8,32] [--prompt 128] [--new-tokens 128] [--long 2000]
        [--prefix 400] [--own 32] [--rounds 3] [--threads 2]

Prompts are random tokens, decoding is greedy and without drafts. Printed are medians over the rounds:

- tokens per second of all requests together while all of them are decoded, over those of one request alone;
- seconds between two tokens of a running request, without others and while a long prompt is fed;
- seconds until 32 prompts are fed that share a prefix, and those of 32 that share nothing; and the memory of keys and
  values in use, over that of the prefix once and all that is private.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from satchel.runtime import Generation, GenerationOptions, Generator, Request
from satchel.runtime.execution.kv_cache import position_bytes

SHARING = 32  # prompts with one prefix
QUIET = 200  # tokens before the long prompt arrives

Ids = Callable[[int], list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--requests", default="8,32", help="numbers of requests at once")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--long", type=int, default=2000, help="tokens of the long prompt")
    parser.add_argument("--prefix", type=int, default=400, help="tokens that 32 prompts begin with")
    parser.add_argument("--own", type=int, default=32, help="tokens of each of these prompts' own")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    draw = random.Random(0)
    generator = open_bundle(args)

    def ids(count: int) -> list[int]:
        return [draw.randrange(100, generator.engine.vocabulary) for _ in range(count)]

    generator.generate(ids(16), max_new_tokens=2)  # the first run is slower
    together(generator, [1, *map(int, args.requests.split(","))], ids, args)
    beside_a_long_prompt(generator, ids, args)
    shared_prefix(ids, args)


def open_bundle(args: argparse.Namespace) -> Generator:
    return Generator.open(args.bundle, threads=args.threads, speculate="off")


def exactly(prompt: list[int], new_tokens: int) -> Request:
    """A request that no end token ends."""
    return Request(prompt, GenerationOptions(max_new_tokens=new_tokens, min_new_tokens=new_tokens))


def together(generator: Generator, counts: list[int], ids: Ids, args: argparse.Namespace) -> None:
    speeds: dict[int, list[float]] = {count: [] for count in counts}
    same = True
    for _ in range(args.rounds):
        prompts = [ids(args.prompt) for _ in range(max(counts))]
        answers = []
        for count in counts:  # in turn, so that all see the same machine
            speed, answer = decode_speed(generator, prompts[:count], args.new_tokens)
            speeds[count].append(speed)
            answers.append(answer)
        same = same and all(answer == answers[0] for answer in answers)
    for count in counts:
        ratio = median(each / alone for each, alone in zip(speeds[count], speeds[1], strict=True))
        print(f"{count} at once: {median(speeds[count]):.0f} tokens/s, {ratio:.2f} times one alone")
    print(f"the same answers: {'yes' if same else 'NO'}")


def decode_speed(generator: Generator, prompts: list[list[int]], new_tokens: int) -> tuple[float, tuple[int, ...]]:
    """Tokens per second from when all have their first token until one has ended; and the first one's tokens."""
    capacity = len(prompts[0]) + new_tokens
    scheduler = generator.scheduler(rows=len(prompts), capacity=capacity, stretch=math.inf)
    numbers = [scheduler.submit(exactly(prompt, new_tokens)) for prompt in prompts]
    began: set[int] = set()
    start = end = 0.0
    tokens, found = 0, ()
    while scheduler.running or scheduler.waiting:
        events = scheduler.step()
        now = time.perf_counter()
        if start and not end:
            tokens += sum(len(event.token_ids) for event in events)
        began |= {event.id for event in events if event.token_ids}
        if not start and len(began) == len(prompts):
            start = now
        if start and not end and any(event.outcome is not None for event in events):
            end = now
        for event in events:
            if isinstance(event.outcome, Exception):
                raise event.outcome
            if event.id == numbers[0] and event.outcome is not None:
                found = event.outcome.token_ids
    return tokens / (end - start), found


def beside_a_long_prompt(generator: Generator, ids: Ids, args: argparse.Namespace) -> None:
    quiet: list[float] = []
    waits: list[float] = []
    took: list[float] = []
    alone: list[float] = []
    for _ in range(args.rounds):
        capacity = min(generator.max_context, args.long + 1500)
        scheduler = generator.scheduler(rows=2, capacity=capacity)
        scheduler.submit(exactly(ids(args.prompt), capacity - args.prompt))
        scheduler.step()
        gaps, arrived, late = [quiet, waits], 0.0, -1
        last, tokens = time.perf_counter(), 0
        while late < 0 or arrived:
            events = scheduler.step()
            now = time.perf_counter()
            if any(event.id != late and event.token_ids for event in events):
                gaps[late >= 0].append(now - last)
                last, tokens = now, tokens + 1
            if any(event.id == late and event.outcome is not None for event in events):
                took.append(now - arrived)
                arrived = 0.0
            elif late < 0 and tokens == QUIET:
                late, arrived = scheduler.submit(Request(ids(args.long), GenerationOptions(max_new_tokens=1))), now
            if not scheduler.running:
                raise SystemExit("the running request ended before the long prompt was fed: lower --long")
        scheduler.close(cancel=True)
        scheduler.step()
        alone.append(generator.generate(ids(args.long), max_new_tokens=1).prefill_seconds)
    (median_quiet, p99_quiet), (median_wait, p99_wait) = (
        np.percentile(each, (50, 99)) * 1e3 for each in (quiet, waits)
    )
    print(f"between tokens: {median_quiet:.1f} ms, p99 {p99_quiet:.1f} ms")
    print(
        f"while a prompt of {args.long} tokens is fed: {median_wait:.1f} ms, p99 {p99_wait:.1f} ms, "
        f"{p99_wait / p99_quiet:.2f} times the quiet one"
    )
    print(f"the prompt took {median(took):.1f} s, {median(alone):.1f} s alone")


def shared_prefix(ids: Ids, args: argparse.Namespace) -> None:
    ratios: list[float] = []
    for _ in range(args.rounds):
        common = ids(args.prefix)
        apart = [ids(args.prefix + args.own) for _ in range(SHARING)]
        sharing = [common + ids(args.own) for _ in range(SHARING)]
        seconds = []
        for prompts in (apart, sharing):
            generator = open_warm(ids, args)
            start = time.perf_counter()
            run_all(generator, prompts, 1)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[0] / seconds[1])
    generator = open_warm(ids, args)
    results = run_all(generator, sharing, args.new_tokens)
    private = args.own + args.new_tokens - 1
    least = (args.prefix + SHARING * private) * position_bytes(generator.engine.bundle.kv_cache)
    most = max(result.kv_bytes for result in results) * SHARING
    print(f"{SHARING} prompts with {args.prefix} tokens in common: prefill {median(ratios):.1f} times less")
    print(f"keys and values: {most / 2**20:.1f} MiB, {most / least:.2f} times the prefix and all private parts")


def open_warm(ids: Ids, args: argparse.Namespace) -> Generator:
    """A generator whose first batch has run: before it, one tries whether rows run together get their own answers."""
    generator = open_bundle(args)
    run_all(generator, [ids(16)], 2)
    return generator


def run_all(generator: Generator, prompts: list[list[int]], new_tokens: int) -> list[Generation]:
    requests = [exactly(prompt, new_tokens) for prompt in prompts]
    found = []
    for _, outcome in generator.run_requests(requests, rows=len(requests)):
        if not isinstance(outcome, Generation):
            raise outcome
        found.append(outcome)
    return found


if __name__ == "__main__":
    main()
