"""Greedy tokens and their logits from onnxruntime-genai, and the same from satchel's own engine.

Run as a script it is that runner's process: it brings settings of ONNX Runtime of its own.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from satchel.runtime import Engine

Continued = tuple[list[int], NDArray[np.float32]]
"""Tokens, and the logits that each was chosen by, [tokens, vocabulary]."""


def by_genai(folder: Path, prompts: list[list[int]], count: int, place: Path, adapter: str = "") -> list[Continued]:
    """`count` tokens after each prompt, or as many as come before an end token; `place` is a folder to work in.

    `adapter` is the name of one of the bundle's, which that runner reads from its file.

    Skips the test where that runner is not installed.
    """
    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai is not installed: `make test` installs it")
    command = [sys.executable, __file__, str(folder), json.dumps(prompts), str(count), str(place), adapter]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    tokens = json.loads(done.stdout.splitlines()[-1])
    return [(found, np.load(place / f"logits-{index}.npy")) for index, found in enumerate(tokens)]


def by_satchel(engine: Engine, prompts: list[list[int]], count: int, adapter: str | None = None) -> list[Continued]:
    """The same through `prefill` and `decode`."""
    ends = engine.bundle.manifest.model.eos_token_ids
    continued = []
    for prompt in prompts:
        state = engine.new_state(len(prompt) + count, adapter)
        logits, tokens, rows = engine.prefill(state, prompt), [], []
        while len(tokens) < count and (best := int(logits.argmax())) not in ends:
            tokens.append(best)
            rows.append(logits.copy())
            logits = engine.decode(state, best)
        continued.append((tokens, np.stack(rows)))
    return continued


def _generate(folder: str, prompts: list[list[int]], count: int, place: Path, adapter: str) -> None:
    import onnxruntime_genai as og

    model: Any = og.Model(folder)
    adapters: Any = og.Adapters(model)
    if adapter:
        adapters.load(f"{folder}/{adapter}.onnx_adapter", adapter)
    continued = []
    for index, prompt in enumerate(prompts):
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + count, do_sample=False)
        generator, rows = og.Generator(model, params), []
        if adapter:
            generator.set_active_adapter(adapters, adapter)
        generator.append_tokens(prompt)
        while not generator.is_done():
            rows.append(np.array(generator.get_logits(), np.float32).reshape(-1))
            generator.generate_next_token()
        tokens = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
        np.save(place / f"logits-{index}.npy", np.stack(rows[: len(tokens)]))
        continued.append(tokens)
    print(json.dumps(continued))


if __name__ == "__main__":
    _generate(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5])
