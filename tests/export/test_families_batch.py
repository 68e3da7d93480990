"""Rows of different lengths, padded on the right, go through the graphs together as they would alone."""

from __future__ import annotations

import numpy as np
import pytest
from support.dynamic_graphs import together
from support.exported import difference, exported
from support.families import TOLERANCE

LENGTHS, NEXT = (13, 5, 9), np.asarray([11, 50, 96])


# A window; a rotation outside the operator; positions that are looked up; experts.
@pytest.mark.parametrize("name", ["gemma2", "stablelm", "gpt2", "mixtral"])
def test_padded_rows_give_what_each_row_gives_alone(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle = exported(name, tmp_path_factory)
    rows = [bundle.ids[3 * i : 3 * i + length] for i, length in enumerate(LENGTHS)]
    prompt, step = together(bundle.folder, rows, NEXT)
    for row, token, after_prompt, after_step in zip(rows, NEXT, prompt, step, strict=True):
        expected = bundle.engine.score(np.append(row, token))
        assert difference(after_prompt, expected[-2]) <= TOLERANCE
        assert difference(after_step, expected[-1]) <= TOLERANCE
