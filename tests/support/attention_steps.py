"""Steps of attention that tests compare, by what they are of."""

from __future__ import annotations

import dataclasses

from support.attention_node import Step

from satchel.runtime.kernels.library import instruction_set

STEPS = {
    "decode": Step(past=40, rotary=64),
    "decode over several ranges": Step(past=1500, rotary=64),
    "decode without a past": Step(rotary=64),
    "decode of rows of different lengths": Step(past=(3, 0, 700, 129), rotary=64),
    "decode in a window": Step(past=500, window=130, rotary=64),
    "decode with a window of one": Step(past=20, window=1),
    "decode with a cap": Step(past=300, softcap=5.0, scale=0.5),
    "decode of one head to each key head": Step(heads=3, kv_heads=3, past=77, head_dim=128),
    "decode of five heads to a key head": Step(heads=5, kv_heads=1, past=300, head_dim=80, rotary=32),
    "decode of an odd width": Step(heads=4, past=50, head_dim=37, rotary=10, interleaved=True),
    "prompt": Step(tokens=150, rotary=64),
    "prompt of several rows": Step(tokens=70, rows=3, rotary=64),
    "chunk over a past": Step(tokens=50, past=333, rotary=64),
    "two tokens": Step(tokens=2, past=95, rotary=64, interleaved=True),
    "window across blocks": Step(tokens=130, past=150, window=100, rotary=64),
    "window below a block": Step(tokens=200, window=5),
    "window of one": Step(tokens=9, past=4, window=1),
    "cap": Step(tokens=60, past=60, softcap=5.0, scale=0.5),
    "negative scale": Step(tokens=60, scale=-0.3),
    "part of the channels": Step(tokens=33, past=10, head_dim=80, rotary=32),
    "pairs of part of the channels": Step(tokens=33, past=10, head_dim=96, rotary=22, interleaved=True),
    "wide heads": Step(heads=2, kv_heads=1, head_dim=512, tokens=20, past=10, rotary=512),
    "narrow heads": Step(heads=8, kv_heads=1, head_dim=8, tokens=40, past=100, spare=0),
    "decode of rows of two blocks of angles": Step(past=(3, 0, 700, 129), rotary=64, block=800),
    "chunk in the second block of angles": Step(tokens=50, past=333, rotary=64, block=200),
    "prompt in the second block of angles": Step(tokens=70, rotary=64, block=5, interleaved=True),
    "an odd width": Step(heads=7, kv_heads=1, head_dim=37, tokens=65, past=31),
}
STEPS |= {
    f"{cache}: {name}": dataclasses.replace(step, cache=cache)
    for cache in ("float16", "int8")
    for name, step in STEPS.items()
}
PROMPTS = {name: step for name, step in STEPS.items() if step.tokens > 1}

PRECISION = 3e-6
"""Largest difference from float64, of the largest number: that of float32."""
AMX_PRECISION = 2e-5
"""The same where AMX's tiles attend: a float is two numbers of bfloat16, with 16 bits and an error of up to 2^-16."""


def precision_of(step: Step) -> float:
    """That of the instruction set that runs."""
    return AMX_PRECISION if instruction_set() == "amx" and step.tokens > 1 else PRECISION
