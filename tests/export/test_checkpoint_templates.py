"""Chat templates and the names of special tokens: from every file that holds them, in transformers' order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import add_tokenizer, save_tiny, tiny_model, write_gguf
from support.checkpoints import gguf_metadata as metadata_of
from support.gguf_families import to_gguf as tensors_of
from support.tiny_bundle import write_bundle
from support.tiny_tokenizers import byte_level_json
from transformers import AutoTokenizer

from satchel.export.checkpoint import open_checkpoint
from satchel.export.checkpoint.companions import folder_companions, with_names
from satchel.export.checkpoint.templates import folder_templates, template_files, template_sources
from satchel.export.checkpoint.tokenizer import folder_tokenizer
from satchel.export.errors import ExportError
from satchel.runtime.generation.templates.chat_template import ChatTemplate
from satchel.runtime.ort.open_bundle import open_bundle

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TOOLS = "{{ tools | tojson }}" + PLAIN
ASKED = [{"role": "user", "content": "what time is it?"}]
SCHEMA = [{"type": "function", "function": {"name": "clock", "description": "the time", "parameters": {}}}]
LISTED = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": TOOLS}]

STORED: dict[str, dict[str, Any]] = {
    "one in the config": {"tokenizer_config.json": {"chat_template": PLAIN}},
    "a list in the config": {"tokenizer_config.json": {"chat_template": LISTED}},
    "a file": {"chat_template.jinja": PLAIN},
    "a file before the config": {"chat_template.jinja": PLAIN, "tokenizer_config.json": {"chat_template": LISTED}},
    "a folder": {"chat_template.jinja": PLAIN, "additional_chat_templates/tool_use.jinja": TOOLS},
    "a folder with an odd name": {"chat_template.jinja": PLAIN, "additional_chat_templates/rag.v2.jinja": TOOLS},
}


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("tools", [None, SCHEMA, []])
def test_templates_are_found_and_chosen_as_in_transformers(kind: str, tools: Any, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, STORED[kind])
    original = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with bundled(folder) as template:
        named = original.chat_template if isinstance(original.chat_template, dict) else {"default": PLAIN}
        assert template.sources == named
        expected = original.apply_chat_template(ASKED, tools=tools, tokenize=False, add_generation_prompt=True)
        assert template.render(ASKED, tools=tools) == expected
        for name in named:
            chosen = original.apply_chat_template(ASKED, chat_template=named[name], tools=tools, tokenize=False)
            assert template.render(ASKED, tools=tools, template=name) == chosen


def test_the_template_of_a_processor_comes_last(tmp_path: Path) -> None:
    files = {"chat_template.json": {"chat_template": TOOLS}}
    assert folder_templates(folder_with(tmp_path, files)) == {"chat_template.jinja": TOOLS.encode()}
    folder_with(tmp_path, {"tokenizer_config.json": {"chat_template": PLAIN}})
    assert folder_templates(tmp_path) == {"chat_template.jinja": PLAIN.encode()}
    assert {path.name for path in template_sources(tmp_path)} == {"chat_template.json", "tokenizer_config.json"}


def test_the_named_templates_of_a_gguf_file_are_in_the_bundle(tmp_path: Path) -> None:
    model = tiny_model("llama")
    keys = {"tokenizer.chat_template": PLAIN, "tokenizer.chat_template.tool_use": TOOLS}
    path = write_gguf(tmp_path / "m.gguf", "llama", metadata_of("llama"), tensors_of("llama", model), metadata=keys)
    companions = open_checkpoint(path).companions
    assert companions["chat_template.jinja"] == PLAIN.encode()
    assert companions["chat_template.tool_use.jinja"] == TOOLS.encode()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"chat_template.jinja": "{% if %}"}, "'default'.*cannot be read at line 1"),
        ({"additional_chat_templates/tool_use.jinja": "{{ 'x' | nothing }}"}, "'tool_use'.*No filter named"),
        ({"tokenizer_config.json": {"chat_template": 3}}, r"tokenizer_config\.json: chat_template is int"),
        ({"tokenizer_config.json": {"chat_template": []}}, "chat_template is list"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default"}]}}, "'default' is NoneType"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "../x", "template": ""}]}}, r"'\.\./x' has a name"),
        ({"chat_template.json": {"chat_template": "{{"}}, r"chat_template\.json: .*cannot be read"),
    ],
)
def test_what_is_no_template_is_refused_in_one_line(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        folder_templates(folder_with(tmp_path, files))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(("correct or remove it", "rename it"))


def test_a_checkpoint_with_a_wrong_template_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, tokenizer=True)
    (tmp_path / "chat_template.jinja").write_text("{% endif %}")
    with pytest.raises(ExportError, match="'default'"):
        open_checkpoint(tmp_path)


NAMES: dict[str, dict[str, Any]] = {
    "config": {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}}},
    "map alone": {"special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}},
    "map over config": {
        "tokenizer_config.json": {"eos_token": "<unk>", "pad_token": "</s>"},
        "special_tokens_map.json": {"eos_token": {"content": "</s>", "normalized": False}},
    },
    "map not read": {
        "tokenizer_config.json": {
            "eos_token": "<unk>",
            "added_tokens_decoder": {"0": {"content": "<unk>", "special": True}},
        },
        "special_tokens_map.json": {"eos_token": "</s>", "bos_token": "<s>"},
    },
    "null": {"tokenizer_config.json": {"bos_token": None, "eos_token": "</s>"}},
    "class": {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
    "of the model": {
        "tokenizer_config.json": {
            "eos_token": "</s>",
            "image_token": "<image>",
            "extra_special_tokens": {"audio_token": "<audio>"},
        }
    },
    "added": {
        "tokenizer_config.json": {"eos_token": "<|im_end|>"},
        "added_tokens.json": {"<|im_start|>": 345, "<|im_end|>": 346},
    },
}


@pytest.mark.parametrize("kind", NAMES)
def test_special_tokens_have_the_names_and_ids_that_transformers_gives_them(kind: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, NAMES[kind])
    (folder / "chat_template.jinja").write_text(PLAIN)
    original = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    with bundled(folder) as template:
        assert template.special == original.special_tokens_map
    files = folder_tokenizer(folder)
    assert files is not None
    for name in ("bos", "eos", "pad"):
        assert getattr(files, f"{name}_token_id") == getattr(original, f"{name}_token_id")


def test_a_name_that_only_the_map_holds_ends_generation(tmp_path: Path) -> None:
    save_tiny(tmp_path, tokenizer=True, eos_token_id=None)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert open_checkpoint(tmp_path).eos_token_ids == (2,)


def test_template_names_are_file_names() -> None:
    assert template_files({"default": PLAIN, "rag": TOOLS}, "here").keys() == {
        "chat_template.jinja",
        "chat_template.rag.jinja",
    }


def folder_with(folder: Path, files: dict[str, Any]) -> Path:
    """A folder with a byte-level tokenizer, the config of a Llama, and these files."""
    add_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def bundled(folder: Path) -> ChatTemplate:
    """The templates that a bundle of this folder has."""
    files = folder_tokenizer(folder)
    assert files is not None
    companions = with_names({**folder_companions(folder), **folder_templates(folder)}, files.names)
    contents = {name: file if isinstance(file, bytes) else file.read_bytes() for name, file in companions.items()}
    bundle = write_bundle(folder / "bundle", tokenizer=byte_level_json(), companions=contents)
    return ChatTemplate.open(open_bundle(bundle))
