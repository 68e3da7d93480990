"""A bundle's graphs follow onnxruntime-genai's own conventions, so that runner opens the folder as it is."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from integration.conftest import NEW_TOKENS, Reference

pytestmark = pytest.mark.slow

# In a process of its own: that runner brings ONNX Runtime's settings of its own.
GENERATE = """
import json, sys
import onnxruntime_genai as og
folder, prompt, count = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(folder)
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(prompt) + count, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(prompt)
for _ in range(count):
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)[len(prompt):]]))
"""


def test_onnxruntime_genai_generates_the_same_tokens(smollm2: Path, reference: Reference) -> None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip("onnxruntime-genai is not installed: `make test` installs it")
    arguments = [str(smollm2), json.dumps(reference.prompt_ids), str(NEW_TOKENS)]
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == reference.greedy_ids
