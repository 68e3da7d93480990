"""Stop strings: found however the text is split, never shown, and what was held back for nothing is let go."""

from __future__ import annotations

import random

from satchel.runtime.generation.stop_strings import StopStrings


def run(strings: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    """What is shown of a text in pieces, with the end that was held back, and whether it was stopped."""
    stops, shown = StopStrings(strings), ""
    for piece in pieces:
        safe, found = stops.add(piece)
        shown += safe
        if found:
            assert stops.finish() == ""
            return shown, True
    return shown + stops.finish(), False


def cut(strings: tuple[str, ...], text: str) -> tuple[str, bool]:
    """The same by looking at every beginning of the text, and at every string at its end."""
    for end in range(len(text) + 1):
        starts = [end - len(string) for string in strings if text[:end].endswith(string)]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_random_texts_are_cut_as_by_looking_at_all_of_them() -> None:
    rng = random.Random(7)
    stopped = 0
    for _ in range(3000):
        strings = tuple("".join(rng.choices("ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3)))
        text = "".join(rng.choices("abc", k=rng.randint(0, 12)))
        pieces, rest = [], text
        while rest:
            size = rng.randint(1, 4)
            pieces.append(rest[:size])
            rest = rest[size:]
        assert run(strings, pieces) == cut(strings, text), (strings, pieces)
        stopped += cut(strings, text)[1]
    assert 500 < stopped < 2900
