"""Text from Python: python samples/generate.py BUNDLE "The capital of France is" """

from __future__ import annotations

import sys

from satchel.runtime import Generator


def main(bundle: str, prompt: str) -> None:
    """Stream a continuation, then print its speed."""
    generator = Generator.open(bundle, threads=2)
    with generator.stream(prompt, max_new_tokens=48) as stream:
        for piece in stream:
            print(piece, end="", flush=True)
        print()
        result = stream.result()
    print(f"{result.new_tokens} tokens, {result.decode_speed:.0f} tokens/s, ended by {result.finish_reason}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit('usage: python samples/generate.py BUNDLE "PROMPT"')
    main(sys.argv[1], sys.argv[2])
