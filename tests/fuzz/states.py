"""Mutants of what is kept between tokens: the states that a manifest lists, and saved states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fuzz.edges import NUMBERS
from fuzz.mutate import Random, mutate_bytes, mutate_json, state_with
from fuzz.trial import RUN, Trial


def change_states(rng: Random, document: Any) -> None:
    """The sizes and types of what layers keep, in the list of states and in the graphs alike; or one more, or less."""
    states = document.setdefault("states", [])
    how = rng.choice(("shape", "dtype", "kind", "layer", "drop", "twice"))
    if not states or how == "twice":
        states += states[:1] or [
            {"layer": 0, "kind": "conv", "dtype": "float32", "shape": [64, 3], "past": "past.0.conv"}
            | {"present": "present.0.conv"}
        ]
        return
    state = rng.choice(states)
    if how == "drop":
        states.remove(state)
    elif how == "layer":
        state["layer"] = rng.choice(NUMBERS)
    elif how == "kind":
        state["kind"] = rng.choice(("conv", "recurrent", "key"))
    elif how == "dtype":
        state["dtype"] = rng.choice(("float16", "int8", "float32", "float64"))
    else:
        state["shape"][rng.randrange(len(state["shape"]))] = rng.choice((0, 1, 2, 3, 63, 65, 1 << 20, 1 << 40))
    for graph in document["graphs"].values():
        for tensor in (*graph["inputs"], *graph["outputs"]):
            if tensor["name"] in (state["past"], state["present"]):
                tensor |= {"dtype": state["dtype"], "shape": ["batch", *state["shape"]]}


def state_file(rng: Random, folder: Path) -> Trial:
    """A saved state: its bytes, those of its header, or the JSON in it under a right hash."""
    path = folder.parent / "talk.state"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    how = rng.choice(("bytes", "header", "json", "json", "tensors"))
    if how == "json":
        header = json.loads(content[8:end])
        note = mutate_json(rng, header)
        path.write_bytes(state_with(header, content[end:]))
    else:
        first, last = {"bytes": (0, None), "header": (0, end), "tensors": (end, None)}[how]
        changed = mutate_bytes(rng, content, first, last)
        whole = how == "tensors" and rng.random() < 0.7
        path.write_bytes(state_with(json.loads(content[8:end]), changed[end:]) if whole else changed)
        note = how
    return Trial(folder, note, (*RUN, "--load-state", "../talk.state", "--save-state", "../out/later.state"))
