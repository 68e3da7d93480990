"""Opens thousands of changed GGUF files: `python -m fuzz.gguf_files --mutants 20000 --seed 0`, in the folder tests.

Each must be opened and all its weights read, or refused by an ExportError of one line; under a limit of memory, in a
child whose death is seen. Exits with 1 if one ended otherwise, and names it; `--only NUMBER` runs that one again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.mutate import mutate_bytes

EDGES = (0, 1, 2, 3, 31, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, 1 << 63,
         (1 << 64) - 1)  # fmt: skip
BATCH = 100
"""Mutants that share a child."""

MEMORY = 2 << 30
"""Bytes of address space beyond what the parent has."""

SECONDS = 20
"""CPU time of one mutant."""

GOOD = ("opened", "refused")
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_Q = struct.Struct("<Q")


def seed_files(folder: Path) -> list[bytes]:
    """Good files that differ in architecture, vocabulary, types of tensors, and what the metadata has."""
    import gguf
    from support.checkpoints import write_gguf
    from support.gguf_families import GGUF_FAMILIES, gguf_model, write_family

    kind = gguf.GGMLQuantizationType
    byte_level = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.tokens": [*"abcdefgh", "ab", "abc", "<|im_end|>", "<x>"],
        "tokenizer.ggml.token_type": [1] * 10 + [3, 4], "tokenizer.ggml.bos_token_id": 11,
        "tokenizer.ggml.eos_token_id": 10, "tokenizer.chat_template": "{{ messages }}", "general.license": "mit",
    }  # fmt: skip
    pieces = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *"▁abcd", "▁a", "ab", "▁ab"],
        "tokenizer.ggml.scores": [0.0] * 8 + [-1.0, -2.0, -3.0], "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 8,
        "tokenizer.ggml.add_space_prefix": True, "split.no": 0, "split.count": 1, "general.alignment": 32,
    }  # fmt: skip
    kinds = {"attn_q": kind.Q8_0, "attn_v": kind.Q4_0, "ffn_gate": kind.Q4_1}
    quantized = {f"blk.{layer}.{name}.weight": each for layer in range(2) for name, each in kinds.items()}
    found = []
    for name, metadata, types in (
        ("llama", byte_level, quantized), ("qwen3moe", byte_level, {}), ("phi3-long", pieces, {}), ("gemma3", {}, {}),
        ("gpt2", byte_level, {}), ("granitemoe-shared", {}, {}),
    ):  # fmt: skip
        family = GGUF_FAMILIES[name]
        path = write_family(folder / f"{name}.gguf", family, gguf_model(family), metadata=metadata, types=types)
        found.append(path.read_bytes())
    write_gguf(folder / "small.gguf", "llama", {"block_count": 1}, {})
    return [*found, (folder / "small.gguf").read_bytes()]


def fields(content: bytes) -> tuple[list[tuple[int, int]], int]:
    """The places and sizes of all numbers in a good file's header, and where the header ends."""
    found, at = [(4, 4), (8, 8), (16, 8)], 24

    def number(size: int) -> int:
        nonlocal at
        found.append((at, size))
        at += size
        return int.from_bytes(content[at - size : at], "little")

    def text() -> None:
        nonlocal at
        length = number(8)
        at += length

    def value(kind: int) -> None:
        if kind in _SIZES:
            number(_SIZES[kind])
        elif kind == 8:
            text()
        else:
            inner = number(4)
            for _ in range(number(8)):
                value(inner)

    tensors, keys = _Q.unpack_from(content, 8)[0], _Q.unpack_from(content, 16)[0]
    for _ in range(keys):
        text()
        value(number(4))
    for _ in range(tensors):
        text()
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return found, at


def mutant(rng: random.Random, seeds: list[bytes]) -> tuple[bytes, str]:
    """A changed file, and what was changed: numbers of the header, bytes of it, texts, or the end of the file."""
    content = bytearray(rng.choice(seeds))
    places, end = fields(bytes(content))
    what = rng.choice(("number", "number", "number", "numbers", "bytes", "cut", "text"))
    if what == "bytes":
        return mutate_bytes(rng, bytes(content), 0, end), what
    if what == "cut":
        length = rng.choice((rng.randrange(len(content)), rng.randrange(end + 1), end))
        return bytes(content[:length]), f"cut at {length}"
    if what == "text":
        words = (b"llama", b"general.architecture", b"blk.0", b"blk.1", b"weight", b"attention", b"tokenizer", b"count")
        word, other = rng.sample(words, 2)
        return bytes(content[:end]).replace(word, other[: len(word)].ljust(len(word), b"_")) + bytes(content[end:]), (
            f"{word.decode()} is {other.decode()}"
        )
    notes = []
    for _ in range(1 if what == "number" else rng.choice((2, 3, 8))):
        at, size = rng.choice(places)
        old = int.from_bytes(content[at : at + size], "little")
        new = rng.choice((rng.choice(EDGES), old + rng.choice((-1, 1, 32)), old * 2, rng.getrandbits(64)))
        content[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")
        notes.append(f"{size} bytes at {at}: {old} is {new % (1 << 8 * size)}")
    return bytes(content), ", ".join(notes)


def outcome(path: Path) -> tuple[str, str]:
    """How opening a file ended, and what was said."""
    from satchel.export.checkpoint import open_checkpoint
    from satchel.export.errors import ExportError

    try:
        checkpoint = open_checkpoint(path)
        for weight in {id(w): w for w in checkpoint.weights.values()}.values():
            weight.numpy()
            weight.rows(0, 1)
    except ExportError as error:
        return ("refused" if "\n" not in str(error) and path.name in str(error) else "not one line"), str(error)
    except Exception:  # noqa: BLE001 - whatever it is, it must be seen
        return "let an exception through", traceback.format_exc(limit=-6)
    return "opened", ""


def run(seed: int, indices: range, seeds: list[bytes], folder: Path) -> Iterator[tuple[int, str, str, str]]:
    """Make, open and judge the mutants of these numbers, a batch in each child; yields number, note, how, said."""
    for first in range(indices.start, indices.stop, BATCH):
        left = list(range(first, min(first + BATCH, indices.stop)))
        while left:
            ended = list(_child(seed, left, seeds, folder))
            yield from ended
            left = left[len(ended) :]


def _child(seed: int, indices: list[int], seeds: list[bytes], folder: Path) -> Iterator[tuple[int, str, str, str]]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _in_child(seed, indices, seeds, folder, write)
    os.close(write)
    with os.fdopen(read, encoding="utf-8") as lines:
        count = 0
        for line in lines:
            yield tuple(json.loads(line))
            count += 1
    _, status = os.waitpid(child, 0)
    if count < len(indices):
        _, note = mutant(random.Random(f"{seed}/{indices[count]}"), seeds)
        yield indices[count], note, f"died of signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "ended", ""


def _in_child(seed: int, indices: list[int], seeds: list[bytes], folder: Path, write: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(BaseException), os.fdopen(write, "w", encoding="utf-8") as out:
        for index in indices:
            spent = int(sum(os.times()[:2]))
            resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, spent + SECONDS))
            content, note = mutant(random.Random(f"{seed}/{index}"), seeds)
            path = folder / "mutant.gguf"
            path.write_bytes(content)
            out.write(json.dumps([index, note, *outcome(path)]) + "\n")
            out.flush()
    os._exit(0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=20000, help="how many (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default %(default)s)")
    parser.add_argument("--only", metavar="NUMBER", type=int, help="one of them, with all that it said")
    args = parser.parse_args()
    started, counts = time.monotonic(), Counter[str]()
    indices = range(args.mutants) if args.only is None else range(args.only, args.only + 1)
    with tempfile.TemporaryDirectory(prefix="satchel-fuzz-") as name:
        seeds = prepare(Path(name))
        for index, note, how, said in run(args.seed, indices, seeds, Path(name)):
            counts[how] += 1
            if how not in GOOD or args.only is not None:
                print(f"{index} ({note}): {how}\n{said}", flush=True)
    print(f"{counts.total():,} mutants of seed {args.seed} in {time.monotonic() - started:.0f} s: {dict(counts)}")
    return int(any(how not in GOOD for how in counts))


def prepare(folder: Path) -> list[bytes]:
    """Write the good files, and load what opening a file needs, once for all children. Returns the files' contents."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    seeds = seed_files(folder)
    for index, content in enumerate(seeds):
        path = folder / f"seed-{index}.gguf"
        path.write_bytes(content)
        outcome(path)
        path.unlink()
    for path in folder.glob("*.gguf"):
        path.unlink()
    return seeds


if __name__ == "__main__":
    sys.exit(main())
