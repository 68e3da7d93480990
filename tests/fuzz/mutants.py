"""Bundles that a hostile or careless hand changed, with hashes and digest made right again: parsers are reached.

A kind of mutant is a function `(random, folder) -> Trial`: it changes the good bundle in `folder`, and says on which
path which command is to run. `KINDS` has them all, with how often each comes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import onnx
from fuzz.edges import LOCATIONS, NUMBERS, TEMPLATE_PARTS, TEXTS
from fuzz.mutate import Random, mend, mutate_bytes, mutate_json
from fuzz.states import change_states, state_file
from fuzz.trial import CHAT, RUN, Make, Trial, some_command
from support.tiny_bundle import read_manifest, write_manifest

from satchel.runtime.bundle.archive.zip_writer import Entry, zip_parts


def manifest_values(rng: Random, folder: Path) -> Trial:
    """Values and keys of the manifest, under a right digest."""
    document = read_manifest(folder)
    note = mutate_json(rng, document)
    try:
        write_manifest(folder, document)
    except ValueError:
        (folder / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    return Trial(folder, note, some_command(rng))


def manifest_files(rng: Random, folder: Path) -> Trial:
    """Which file is what, with the hashes of what then lies there."""
    document = read_manifest(folder)
    notes = []
    for _ in range(rng.choice((1, 2))):
        name = rng.choice((*document["files"], *TEXTS))
        slot = rng.choice(("prefill", "decode", "score", "tokenizer", "files", "cache", "size", "states"))
        if slot in ("prefill", "decode", "score"):
            document["graphs"][slot]["file"] = name
        elif slot == "tokenizer":
            document["tokenizer"] |= {"file": name, "kind": rng.choice(("tokenizer.json", "sentencepiece"))}
        elif slot == "files":
            document["files"][name] = {"bytes": rng.choice(NUMBERS), "sha256": "0" * 64}
        elif slot == "cache":
            layer = rng.choice(document["kv_cache"]["layers"])
            layer[rng.choice(("kv_heads", "key_dim", "value_dim"))] = rng.choice((1, 3, 16, 32, 1024, 1 << 20))
        elif slot == "states":
            change_states(rng, document)
        else:
            document["model"][rng.choice(("vocab_size", "max_context"))] = rng.choice((1, 300, 401, 1 << 20, 1 << 24))
        notes.append(f"{slot} {name[:20]!r}")
    mend(folder, document)
    return Trial(folder, ", ".join(notes), some_command(rng))


def manifest_text(rng: Random, folder: Path) -> Trial:
    """The manifest's bytes; the digest is made right where they are still JSON."""
    path = folder / "manifest.json"
    path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    try:
        document = json.loads(path.read_bytes())
        if isinstance(document, dict):
            write_manifest(folder, document)
    except (ValueError, RecursionError):
        pass
    return Trial(folder, "bytes", some_command(rng))


def nested(rng: Random, folder: Path) -> Trial:
    """Depth, length and keys that come twice."""
    path, depth = folder / "manifest.json", rng.choice((30, 39, 41, 1000, 100_000))
    deep = "[" * depth + "]" * depth
    text = path.read_text(encoding="utf-8")
    how = rng.randrange(4)
    if how == 0:
        text = text.replace('"passes": []', f'"passes": [{{"a": {deep}}}]')
    elif how == 1:
        text = '{"a":' * depth + "1" + "}" * depth
    elif how == 2:
        text = text.replace('"version"', '"version": 2, "version"', 1)
    else:
        text = text.replace('"passes": []', f'"passes": [{{"a": {"9" * depth}}}]')
    path.write_text(text, encoding="utf-8")
    return Trial(folder, f"{how} {depth}", some_command(rng))


def tokenizer(rng: Random, folder: Path) -> Trial:
    """tokenizer.json, as JSON or as bytes."""
    path = folder / "tokenizer.json"
    if rng.random() < 0.7:
        document = json.loads(path.read_bytes())
        note = mutate_json(rng, document)
        path.write_text(json.dumps(document), encoding="utf-8")
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        note = "bytes"
    mend(folder)
    return Trial(folder, note)


def sentencepiece(rng: Random, folder: Path) -> Trial:
    """A SentencePiece model's bytes, or those of something else."""
    from support.tiny_tokenizers import sentencepiece_model

    content = sentencepiece_model()
    content = mutate_bytes(rng, content) if rng.random() < 0.9 else rng.randbytes(100)
    document = read_manifest(folder)
    (folder / "tokenizer.model").write_bytes(content)
    document["files"]["tokenizer.model"] = {"bytes": 0, "sha256": ""}
    document["tokenizer"] |= {"kind": "sentencepiece", "file": "tokenizer.model", "add_bos": rng.random() < 0.5}
    mend(folder, document)
    return Trial(folder, "bytes")


def chat_template(rng: Random, folder: Path) -> Trial:
    """The chat template: pieces that attack, or changed bytes."""
    path = folder / "chat_template.jinja"
    if rng.random() < 0.7:
        text = "".join(rng.choice(TEMPLATE_PARTS) for _ in range(rng.choice((1, 2, 4))))
        path.write_text(text, encoding="utf-8")
        note = text[:60]
    else:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
        note = "bytes"
    mend(folder)
    return Trial(folder, note, CHAT)


def companions(rng: Random, folder: Path) -> Trial:
    """generation_config.json and tokenizer_config.json."""
    document = read_manifest(folder)
    for name, content in (
        ("generation_config.json", {"temperature": 0.7, "top_k": 5, "do_sample": True, "repetition_penalty": 1.1}),
        ("tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None}),
    ):
        changed: Any = content
        mutate_json(rng, changed)
        text = json.dumps(changed) if rng.random() < 0.8 else "[" * rng.choice((2, 100_000))
        (folder / name).write_text(text, encoding="utf-8")
        document["files"][name] = {"bytes": 0, "sha256": ""}
    mend(folder, document)
    return Trial(folder, "companions", CHAT)


GRAPH_CHANGES = ("operator", "input", "output", "dims", "type", "attribute", "remove", "loop", "opset", "shape")
OPERATORS = ("Identity", "If", "Loop", "MatMul", "Nothing", "Gather", "EPContext", "", "Reshape")
OFFSETS = ("-1", "0", "1", "63", "", "x", "1e3", str(1 << 62), str(1 << 64), "9" * 400, "+4")


def graph_bytes(rng: Random, folder: Path) -> Trial:
    """The bytes of a graph."""
    name = rng.choice(("prefill.onnx", "decode.onnx"))
    (folder / name).write_bytes(mutate_bytes(rng, (folder / name).read_bytes()))
    mend(folder)
    return Trial(folder, name)


def graph_structure(rng: Random, folder: Path) -> Trial:
    """Nodes, shapes, attributes and initializers of a graph."""
    name = rng.choice(("prefill.onnx", "decode.onnx"))
    model = onnx.load(folder / name, load_external_data=False)
    graph, notes = model.graph, []
    for _ in range(rng.choice((1, 1, 2, 3))):
        node, tensor = rng.choice(graph.node), rng.choice(graph.initializer)
        value = rng.choice((*graph.input, *graph.output))
        what = rng.choice(GRAPH_CHANGES)
        if what == "operator":
            node.op_type = rng.choice(OPERATORS)
        elif what == "input" and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice((tensor.name, node.output[0], "", "nowhere"))
        elif what == "output":
            node.output[0] = rng.choice((tensor.name, node.name, "logits", ""))
        elif what == "dims" and tensor.dims:
            tensor.dims[0] = rng.choice((0, 1, -1, 1 << 20, 1 << 40, (1 << 63) - 1))
        elif what == "type":
            tensor.data_type = rng.choice((0, 1, 7, 8, 10, 16, 21, 99))
        elif what == "attribute" and node.attribute:
            attribute = rng.choice(node.attribute)
            attribute.i, attribute.f = rng.choice((0, -1, 1, 3, 1 << 40)), rng.choice((0.0, float("nan"), 1e30))
        elif what == "remove":
            graph.node.remove(node)
        elif what == "loop" and node.input:
            node.input[0] = graph.node[-1].output[0]
        elif what == "opset":
            model.opset_import[0].version = rng.choice((0, 1, 7, 13, 99, -1))
        elif value.type.tensor_type.shape.dim:
            rng.choice(value.type.tensor_type.shape.dim).dim_value = rng.choice((0, 1, 2, -1, 1 << 40))
        notes.append(what)
    (folder / name).write_bytes(model.SerializeToString())
    mend(folder)
    return Trial(folder, f"{name} {notes}")


def graph_data(rng: Random, folder: Path) -> Trial:
    """Where a graph's weights lie."""
    name = rng.choice(("prefill.onnx", "decode.onnx"))
    model = onnx.load(folder / name, load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    notes = []
    for _ in range(rng.choice((1, 1, 3))):
        tensor = rng.choice(outside)
        entry = rng.choice(tensor.external_data)
        if rng.random() < 0.2:
            tensor.external_data.add(key=rng.choice(("location", "offset", "prepacked_0")), value=rng.choice(LOCATIONS))
        elif entry.key == "location":
            entry.value = rng.choice(LOCATIONS)
        else:
            entry.value = rng.choice(OFFSETS)
        notes.append(f"{tensor.name} {entry.key} {entry.value[:20]}")
    (folder / name).write_bytes(model.SerializeToString())
    mend(folder)
    return Trial(folder, ", ".join(notes))


def weights(rng: Random, folder: Path) -> Trial:
    """The numbers: infinite, no numbers, or missing at the end."""
    content = bytearray((folder / "weights.bin").read_bytes())
    at = rng.randrange(0, len(content), 4)
    how = rng.randrange(4)
    if how == 0:
        content[at : at + 400] = b"\x00\x00\x80\x7f" * 100
    elif how == 1:
        content[at : at + 400] = b"\x00\x00\xc0\x7f" * 100
    elif how == 2:
        del content[at:]
    else:
        content = bytearray(rng.randbytes(len(content)))
    (folder / "weights.bin").write_bytes(content)
    mend(folder)
    return Trial(folder, str(how))


def on_disk(rng: Random, folder: Path) -> Trial:
    """Links, pipes, folders and gaps in the place of files."""
    name = rng.choice([path.name for path in folder.iterdir()])
    path = folder / name
    how = rng.choice(("link", "linked folder", "pipe", "folder", "gone", "empty", "longer", "socket"))
    if how == "link":
        path.rename(folder.parent / "outside" / "moved")
        path.symlink_to(folder.parent / "outside" / "moved")
    elif how == "linked folder":
        document = read_manifest(folder)
        (folder / "sub").symlink_to(folder.parent / "outside")
        document["files"]["sub/secret"] = {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
        mend(folder, document)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "longer":
        with path.open("ab") as file:
            file.write(b"x")
    else:
        path.unlink()
        if how == "pipe":
            os.mkfifo(path)
        elif how == "folder":
            path.mkdir()
        elif how == "socket":
            os.mknod(path, 0o140600)
    return Trial(folder, f"{how} {name}", some_command(rng))


def entries_of(folder: Path) -> list[Entry]:
    """The entries of a packed bundle of this folder, without the runner."""
    names = sorted(path.name for path in folder.iterdir())
    return [Entry("__main__.py", b"pass"), *(Entry(f"bundle/{n}", (folder / n).read_bytes(), 4096) for n in names)]


def zip_bytes(rng: Random, folder: Path) -> Trial:
    """The records of a packed bundle's zip file."""
    content = b"".join(zip_parts(b"#!/usr/bin/env python3\n", entries_of(folder)))
    at = rng.choice([found.start() for found in re.finditer(rb"PK(\x03\x04|\x01\x02|\x05\x06)", content)])
    packed = folder.parent / "packed.pyz"
    packed.write_bytes(mutate_bytes(rng, content, at, at + 80))
    return Trial(packed, f"at {at}", some_command(rng))


def zip_entries(rng: Random, folder: Path) -> Trial:
    """Entries of a packed bundle that are missing, twice there, renamed, empty or in another order."""
    entries = entries_of(folder)
    how = rng.choice(("drop", "twice", "rename", "empty", "shuffle", "more", "unaligned"))
    index = rng.randrange(len(entries))
    entry = entries[index]
    if how == "drop":
        del entries[index]
    elif how == "twice":
        entries.append(entry)
    elif how == "rename":
        name = rng.choice(TEXTS).encode("utf-8", "replace").decode() or "x"
        entries[index] = Entry(rng.choice(("bundle/", "")) + name, entry.content)
    elif how == "empty":
        entries[index] = Entry(entry.name, b"", 4096)
    elif how == "shuffle":
        rng.shuffle(entries)
    elif how == "more":
        entries.append(Entry(rng.choice(("bundle/more", "satchel/runtime/cli/main.py", "numpy.py", "../x")), b"more"))
    else:
        entries = [Entry(one.name, one.content, 1) for one in entries]
    packed = folder.parent / "packed.pyz"
    packed.write_bytes(b"".join(zip_parts(rng.choice((b"", b"#!x\n", b"junk")), entries)))
    return Trial(packed, f"{how} {entry.name}", some_command(rng))


def packed_content(rng: Random, folder: Path) -> Trial:
    """Any of the changes to files, in a packed bundle."""
    make = rng.choice((manifest_values, manifest_files, graph_data, graph_bytes, tokenizer, weights))
    trial = make(rng, folder)
    packed = folder.parent / "packed.pyz"
    packed.write_bytes(b"".join(zip_parts(b"", entries_of(folder))))
    return Trial(packed, f"{make.__name__}: {trial.note}", trial.command)


def signature(rng: Random, folder: Path) -> Trial:
    """signature.json, where one is required."""
    path = folder / "signature.json"
    document = {
        "format": "satchel-signature", "version": 1, "algorithm": "ed25519", "digest": read_manifest(folder)["digest"],
        "public_key": "0" * 64, "signature": "0" * 128,
    }  # fmt: skip
    note = mutate_json(rng, document)
    path.write_text(json.dumps(document), encoding="utf-8")
    if rng.random() < 0.3:
        path.write_bytes(mutate_bytes(rng, path.read_bytes()))
    return Trial(folder, note, (*RUN, "--require-signature", "../key.pub"))


KINDS: dict[Make, int] = {
    manifest_values: 24,
    manifest_files: 8,
    manifest_text: 5,
    nested: 1,
    tokenizer: 12,
    sentencepiece: 5,
    chat_template: 6,
    companions: 3,
    graph_bytes: 8,
    graph_structure: 10,
    graph_data: 6,
    weights: 1,
    on_disk: 3,
    zip_bytes: 6,
    zip_entries: 2,
    packed_content: 5,
    state_file: 8,
    signature: 2,
}
"""The kinds of mutants, with their weights."""
