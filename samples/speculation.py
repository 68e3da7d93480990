"""Times decoding with and without speculation, on texts that repeat and on one that does not.

    python samples/speculation.py BUNDLE [--draft SMALL_BUNDLE] [--rounds 5] [--new-tokens 160] [--threads 2]

Each round opens a generator of its own with and without, so that nothing is known from earlier rounds, and decodes each
text greedily and sampled. Printed are the medians of the ratios, and whether all texts were the same.
"""

from __future__ import annotations

import argparse
from statistics import median
from typing import Any

from satchel.runtime import Generation, Generator

CODE = """\
def area(width, height):
    return width * height

def volume(width, height, depth):
    return width * height * depth

def surface(width, height, depth):
    return 2 * (width * height + width * depth + height * depth)
"""
TEXT = """\
The harbor of the town was built in 1871 by order of the council. It was used by fishing boats until 1950, when the
last of them was sold. In 1988 the council had the quay repaired, and since then the harbor has been used by sailing
boats in summer. The old customs house at the quay is a museum of the town's history today.
"""
PROMPTS = {
    "editing code": f"Rename width to w in this code, and write all of it again:\n{CODE}",
    "summarizing": f"Summarize this text in its own words, sentence by sentence:\n{TEXT}",
    "repeating": f"Repeat this text exactly:\n{TEXT}",
    "not repeating": "Tell me about the history of tea in China.",
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
    found: dict[tuple[str, str], list[tuple[Generation, Generation]]] = {}
    for number in range(args.rounds):
        for text, prompt in PROMPTS.items():
            for name, options in SAMPLING.items():
                pair = {}
                for speculate in ("off", "auto") if number % 2 else ("auto", "off"):  # in turn
                    draft = args.draft if speculate == "auto" else None
                    generator = Generator.open(
                        args.bundle, threads=args.threads, prefix_cache_mib=0, specialize=False, speculate=speculate,
                        draft=draft,
                    )  # fmt: skip
                    ids = generator.encode_chat(prompt) if generator.has_template else generator.encode(prompt)
                    generator.generate([*range(300, 316)], max_new_tokens=4)  # the first run is slower
                    pair[speculate] = generator.generate(ids, max_new_tokens=args.new_tokens, **options)
                found.setdefault((text, name), []).append((pair["off"], pair["auto"]))
    print("| text | tokens | off, tokens/s | auto, tokens/s | times as fast | accepted of drafted | same text |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (text, name), pairs in found.items():
        off, auto = (median(pair[side].decode_speed for pair in pairs) for side in (0, 1))
        ratio = median(auto.decode_speed / off.decode_speed for off, auto in pairs)
        last, same = pairs[-1][1], all(off.token_ids == auto.token_ids for off, auto in pairs)
        print(
            f"| {text}, {name} | {last.new_tokens} | {off:.1f} | {auto:.1f} | {ratio:.2f} | "
            f"{last.accepted_tokens} of {last.drafted_tokens} | {same} |"
        )


if __name__ == "__main__":
    main()
