"""Trains a small hybrid model, exports it, and compares its perplexity in torch with that of the bundles.

    python samples/train_hybrid.py out/hybrid
    python samples/train_hybrid.py out/hybrid --steps 1000 --seed 1

The model has the layers of Qwen3.5: three with a gated delta rule, whose state has a fixed size, then one with
attention. It learns satchel's calibration text, which takes minutes; the held-out text is satchel's evaluation text, in
windows. "score" predicts all tokens of a window at once, "decode" the second half token by token, from the states that
the layers keep.

The folder gets the checkpoint (`checkpoint`) and a bundle for each precision (`fp32`, `int8`, `int4`), which all
commands of satchel take.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from new_path import new_path
from numpy.typing import NDArray
from own_module import END, make_tokenizer

from satchel.export import ExportConfig, export_bundle
from satchel.export.quantize.texts import CALIBRATION, CERTIFICATE
from satchel.runtime import Generator
from satchel.runtime.evaluation.fidelity import cut_windows, evaluate

VOCABULARY, WINDOW, BATCH, LEARNING_RATE = 512, 128, 8, 0.003
WINDOWS, SKIP = 32, 16
"""Windows of the held-out text, and the positions at the beginning of each that do not count."""

PROMPT, NEW_TOKENS = "By the time", 48
MODEL = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "linear_num_key_heads": 4, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "vocab_size": VOCABULARY, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip


def train(ids: Sequence[int], end: int, steps: int, seed: int) -> transformers.PreTrainedModel:
    """A model that has seen `steps` batches of windows of the text, the learning rate falling to zero (cosine)."""
    torch.manual_seed(seed)
    model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**MODEL, eos_token_id=end))
    windows = torch.tensor(ids).unfold(0, WINDOW, 1)  # [starts, window]
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = windows[torch.randint(len(windows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} of {steps}: loss {loss.item():.2f}", flush=True)
    return model.eval()


@torch.no_grad()
def perplexities(model: transformers.PreTrainedModel, windows: Sequence[NDArray[np.int64]]) -> tuple[float, float]:
    """Torch's perplexity over the positions of `evaluate`'s two figures: those from SKIP on, and the second half."""
    losses = []  # of the tokens 1, 2 ... of each window
    for window in windows:
        logits = model(torch.from_numpy(window)[None], use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(window[1:]), reduction="none"))
    return tuple(math.exp(torch.stack(losses)[:, start:].double().mean()) for start in (SKIP, WINDOW // 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the new folder")
    parser.add_argument("--steps", type=int, default=250, help="batches to train on (default: 250)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: 0)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: give at least 1")
    output = new_path(options.output)
    transformers.logging.set_verbosity_error()  # that it has faster kernels for a GPU
    transformers.logging.disable_progress_bar()

    text, held_out = (path.read_text(encoding="utf-8") for path in (CALIBRATION, CERTIFICATE))
    tokenizer = make_tokenizer(text, VOCABULARY)
    model = train(tokenizer.encode(text).ids, tokenizer.token_to_id(END), options.steps, options.seed)
    model.save_pretrained(output / "checkpoint")
    tokenizer.save(str(output / "checkpoint" / "tokenizer.json"))

    windows = cut_windows(tokenizer.encode(held_out).ids, WINDOW, WINDOWS)
    generators, rows = {}, {"torch": perplexities(model, windows)}
    for precision in ("fp32", "int8", "int4"):
        export_bundle(output / "checkpoint", ExportConfig(output / precision, precision, certificate=False))
        generators[precision] = Generator.open(output / precision)
        figures = evaluate(generators[precision].engine, windows, None, skip=SKIP)
        rows[precision] = figures.prefill.perplexity, figures.decode.perplexity
    print(f"{'perplexity':10} {'score':>9} {'decode':>9}")
    for name, (score, decode) in rows.items():
        print(f"{name:10} {score:9.3f} {decode:9.3f}")
    for precision, generator in generators.items():
        print(f"{precision}: {PROMPT + generator.generate(PROMPT, max_new_tokens=NEW_TOKENS).text!r}")


if __name__ == "__main__":
    main()
