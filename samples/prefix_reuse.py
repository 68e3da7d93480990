"""Times prompts with a shared prefix, with and without the prefix cache.

    python samples/prefix_reuse.py BUNDLE [--prompts 32] [--prefix 400] [--own 32] [--new-tokens 16] [--threads 2]

Each prompt is the same random tokens, and then random tokens of its own. The answers must be the same both times.
"""

from __future__ import annotations

import argparse
import random

from satchel.runtime import Generation, Generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prefix", type=int, default=400, help="tokens that all prompts begin with")
    parser.add_argument("--own", type=int, default=32, help="tokens of each prompt's own")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    draw = random.Random(0)
    without = Generator.open(args.bundle, threads=args.threads, prefix_cache_mib=0)
    reusing = Generator.open(args.bundle, threads=args.threads)

    def ids(count: int) -> list[int]:
        return [draw.randrange(100, without.engine.vocabulary) for _ in range(count)]

    for generator in (without, reusing):
        generator.generate(ids(16), max_new_tokens=2)  # the first run is slower
    common = ids(args.prefix)
    prompts = [common + ids(args.own) for _ in range(args.prompts)]
    answers: list[list[Generation]] = [[], []]
    for prompt in prompts:  # in turn, so that both see the same machine
        for generator, given in zip((without, reusing), answers, strict=True):
            given.append(generator.generate(prompt, max_new_tokens=args.new_tokens))
    seconds = [sum(answer.prefill_seconds for answer in given) for given in answers]
    same = sum(left.token_ids == right.token_ids for left, right in zip(*answers, strict=True))
    times = seconds[0] / seconds[1]
    print(f"prefill without reuse {seconds[0]:.3f} s, with {seconds[1]:.3f} s: {times:.1f} times less")
    print(f"reused {sum(answer.reused_tokens for answer in answers[1])} of {sum(map(len, prompts))} prompt tokens")
    print(f"the same answers: {same} of {args.prompts}")


if __name__ == "__main__":
    main()
