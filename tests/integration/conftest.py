"""A real model: SmolLM2-135M-Instruct from its GGUF file, exported once, and the same weights in transformers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from support.export_command import satchel
from support.shared import made_once

CHECKOUT = Path(__file__).parents[2]
DEFAULT_GGUF = CHECKOUT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "Once upon a time, in a small village by the sea,"  # a story: no end token for a while
NEW_TOKENS = 64
TEXT = """The lighthouse keeper counted the ships each evening. There were never more than seven, and he knew them by
their lamps: two green, one red, the rest a tired yellow. On the ninth of March 1911 there were eight.
    for ship in ships:
        print(ship.lamp, sep=", ")
The eighth had no lamp at all; he counted it by the stars that went out behind it, one after the other, and came back.
"""


@dataclass(frozen=True)
class Reference:
    """What transformers computes in float32.

    `logits` [sequence, vocabulary] are those of TEXT, `greedy_ids` NEW_TOKENS tokens after PROMPT, and `greedy_logits`
    [NEW_TOKENS, vocabulary] chose them.
    """

    tokenizer: Any
    text_ids: list[int]
    prompt_ids: list[int]
    logits: NDArray[np.float32]
    greedy_ids: list[int]
    greedy_logits: NDArray[np.float32]


@pytest.fixture(scope="session")
def gguf() -> Path:
    path = Path(os.environ.get("SATCHEL_SMOLLM2_GGUF", DEFAULT_GGUF))
    if not path.is_file():
        pytest.skip(f"{path} is not there: `make test-all` fetches it, or name it in SATCHEL_SMOLLM2_GGUF")
    return path


@pytest.fixture(scope="session")
def smollm2(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(folder: Path) -> None:
        done = satchel("export", gguf, "-o", folder / "fp32", "--precision", "fp32")
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "smollm2", make) / "fp32"


@pytest.fixture(scope="session")
def original(gguf: Path) -> tuple[Any, Any]:
    """The tokenizer and the model in float32, as transformers reads the GGUF file."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    return tokenizer, transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def reference(original: tuple[Any, Any]) -> Reference:
    tokenizer, model = original
    text_ids, prompt_ids = tokenizer(TEXT).input_ids, tokenizer(PROMPT).input_ids
    with torch.no_grad():
        logits = model(torch.tensor([text_ids])).logits[0].numpy()
        ids, cache, rows = torch.tensor([prompt_ids]), None, []
        for _ in range(NEW_TOKENS):
            out = model(ids, past_key_values=cache, use_cache=True)
            rows.append(out.logits[0, -1].numpy())
            ids, cache = torch.tensor([[int(rows[-1].argmax())]]), out.past_key_values
    greedy = [int(row.argmax()) for row in rows]
    return Reference(tokenizer, text_ids, prompt_ids, logits, greedy, np.stack(rows))
