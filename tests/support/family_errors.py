"""Prints the table of measured errors in docs/accuracy.md: python tests/support/family_errors.py"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.exported import CHUNK, PROMPT, Exported, difference, exported
from support.families import FAMILIES


def errors(family: Exported) -> tuple[float, float, float]:
    """The largest differences, as parts of the largest logit: score, prefill in chunks, decode over all steps."""
    score = difference(family.engine.score(family.ids), family.logits)
    state = family.engine.new_state(len(family.ids))
    prefill = difference(family.engine.prefill(state, family.ids[:PROMPT], chunk=CHUNK), family.logits[PROMPT - 1])
    steps = zip(family.ids[PROMPT:], family.logits[PROMPT:], strict=True)
    decode = max(difference(family.engine.decode(state, int(token)), row) for token, row in steps)
    return score, prefill, decode


def main() -> None:
    """Export every family of the tests and print a row for each."""
    with tempfile.TemporaryDirectory() as folder:
        places = pytest.TempPathFactory(Path(folder), 0, "none", lambda *_, **__: None, _ispytest=True)
        for name in FAMILIES:
            with contextlib.redirect_stderr(io.StringIO()):
                row = errors(exported(name, places))
            print(f"| `{name}` | " + " | ".join(f"{error:.1e}" for error in row) + " |")


if __name__ == "__main__":
    main()
