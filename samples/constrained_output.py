"""Times constrained output: what the grammar costs per token, and what the tokens save that it leaves no choice of.

    python samples/constrained_output.py BUNDLE [--rounds 10] [--threads 2]

Each round asks for an answer by each of three grammars, sampled, with and without forced tokens fed in one run. Printed
are medians: seconds of a token in the grammar, those of a token in all, and the first as a share of the second.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

from satchel.runtime import Generation, Generator
from satchel.runtime.generation.constraint import Constraint

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "born": {"type": "integer", "minimum": 1000, "maximum": 2100},
        "languages": {
            "type": "array",
            "items": {"enum": ["English", "French", "German"]},
            "minItems": 1,
            "maxItems": 3,
        },
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string", "maxLength": 40}, "town": {"type": "string", "maxLength": 30}},
            "required": ["street", "town"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "born", "languages", "address"],
    "additionalProperties": False,
}
GRAMMARS: dict[str, dict[str, Any]] = {
    "schema": {"json_schema": PERSON},
    "any object": {"json_object": True},
    "prose": {"regex": r"[A-Z][a-z ,']{60,300}\."},
}
PROMPT = "Describe Ada Lovelace."


class Clock:
    """Adds up the seconds that constraints take."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("masked", "take"):
            setattr(Constraint, name, self._timed(getattr(Constraint, name)))

    def _timed(self, method: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    clock = Clock()
    for speculate in ("off", "auto"):
        generator = Generator.open(args.bundle, threads=args.threads, specialize=False, speculate=speculate)
        ids = generator.encode_chat(PROMPT) if generator.has_template else generator.encode(PROMPT)
        for name, grammar in GRAMMARS.items():
            inside, each, runs = [], [], []
            for seed in range(args.rounds + 1):
                clock.seconds = 0.0
                found: Generation = generator.generate(ids, 300, grammar=grammar, temperature=0.8, seed=seed)
                if seed and found.new_tokens > 1:  # the first one compiles the grammar
                    inside.append(clock.seconds / found.new_tokens)
                    each.append(found.decode_seconds / (found.new_tokens - 1))
                    runs.append(found.accepted_tokens / found.new_tokens)
            if each:
                own, whole = 1e6 * median(inside), 1e6 * median(each)
                print(
                    f"--speculate {speculate}, {name}: {own:.0f} us of {whole:.0f} us per token, "
                    f"{own / whole:.1%}; {median(runs):.0%} of the tokens without a run of their own"
                )


if __name__ == "__main__":
    main()
