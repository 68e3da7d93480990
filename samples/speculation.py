"""Times decoding with and without speculation, on texts that repeat and on one that does not.

    python samples/speculation.py BUNDLE [--draft SMALL_BUNDLE] [--rounds 5] [--new-tokens 160] [--threads 2]

There are three texts of each kind. Each round opens a generator of its own for each, with and without, so that nothing
is known from other texts, and decodes them greedily and sampled. Printed are the medians of the ratios, and whether all
texts were the same.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

from satchel.runtime import Generation, Generator

CODES = (
    """\
def area(width, height):
    return width * height

def volume(width, height, depth):
    return width * height * depth

def surface(width, height, depth):
    return 2 * (width * height + width * depth + height * depth)
""",
    """\
class Account:
    def __init__(self, owner, width):
        self.owner = owner
        self.width = width

    def describe(self):
        return f"{self.owner} has {self.width}"

    def compare(self, other):
        return self.width - other.width
""",
    """\
function table(rows, width) {
  const lines = [];
  for (const row of rows) {
    lines.push(row.map((cell) => cell.padEnd(width)).join(" "));
  }
  const rule = "-".repeat(width * rows[0].length);
  return [rule, ...lines, rule].join("\\n");
}
""",
)
TEXTS = (
    """\
The harbor of the town was built in 1871 by order of the council. It was used by fishing boats until 1950, when the
last of them was sold. In 1988 the council had the quay repaired, and since then the harbor has been used by sailing
boats in summer. The old customs house at the quay is a museum of the town's history today.
""",
    """\
Bees find their way back to the hive by the position of the sun. When clouds hide it, they use the polarization of the
light in the parts of the sky that they see. A bee that has found flowers dances on the comb, and the angle of the dance
tells the others the direction in which to fly. How long the dance takes tells them how far the flowers are.
""",
    """\
The railway between the two valleys was closed in 1972, when most goods went by road. Its tunnel, 1,400 meters long, was
used to grow mushrooms for some years. In 2009 both towns agreed to make a path for bicycles of the old line. The path
was opened in 2013, and in the first summer 60,000 people rode through the tunnel.
""",
)
PROMPTS = {
    "editing code": [f"Rename width to w in this code, and write all of it again:\n{code}" for code in CODES],
    "summarizing": [f"Summarize this text in its own words, sentence by sentence:\n{text}" for text in TEXTS],
    "repeating": [f"Repeat this text exactly:\n{text}" for text in TEXTS],
    "not repeating": [
        "Tell me about the history of tea in China.",
        "Write a letter to a friend about your first day at work.",
        "Explain how a refrigerator works.",
    ],
}
SAMPLING: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.7, "seed": 5}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--draft", help="a bundle of a smaller model with the same tokenizer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    found: dict[tuple[str, str], list[tuple[list[Generation], list[Generation]]]] = {}
    for number in range(args.rounds):
        for kind, prompts in PROMPTS.items():
            for name, options in SAMPLING.items():
                pairs = [answers(args, prompt, options, auto_first=number % 2 == 0) for prompt in prompts]
                off, auto = map(list, zip(*pairs, strict=True))
                found.setdefault((kind, name), []).append((off, auto))
    print("| text | tokens | off, tokens/s | auto, tokens/s | times as fast | accepted of drafted | same text |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (kind, name), rounds in found.items():
        off, auto = (median(speed(pair[side]) for pair in rounds) for side in (0, 1))
        ratio = median(speed(auto) / speed(off) for off, auto in rounds)
        last = rounds[-1][1]
        same = all([each.token_ids for each in off] == [each.token_ids for each in auto] for off, auto in rounds)
        accepted, drafted = (sum(getattr(each, f"{what}_tokens") for each in last) for what in ("accepted", "drafted"))
        print(
            f"| {kind}, {name} | {sum(each.new_tokens for each in last)} | {off:.1f} | {auto:.1f} | {ratio:.2f} | "
            f"{accepted} of {drafted} | {same} |"
        )


def answers(
    args: argparse.Namespace, prompt: str, options: dict[str, Any], *, auto_first: bool
) -> tuple[Generation, Generation]:
    """The answers to a prompt without speculation and with it, in turn."""
    pair = {}
    for speculate in ("auto", "off") if auto_first else ("off", "auto"):
        draft = args.draft if speculate == "auto" else None
        generator = Generator.open(
            args.bundle, threads=args.threads, prefix_cache_mib=0, specialize=False, speculate=speculate, draft=draft
        )
        ids = generator.encode_chat(prompt) if generator.has_template else generator.encode(prompt)
        generator.generate([*range(300, 316)], max_new_tokens=4)  # the first run is slower
        pair[speculate] = generator.generate(ids, max_new_tokens=args.new_tokens, **options)
    return pair["off"], pair["auto"]


def speed(generations: list[Generation]) -> float:
    """Tokens per second of decoding, of several texts together."""
    return sum(each.decode_steps for each in generations) / sum(each.decode_seconds for each in generations)


if __name__ == "__main__":
    main()
