"""A tiny bundle to talk with: a byte-level tokenizer with ChatML's special tokens, and a template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from support.tiny_bundle import write_bundle
from support.tiny_tokenizers import byte_level_json

START, END = 345, 346  # <|im_start|> and <|im_end|>: the ids after those of the byte-level tokenizer
CONTEXT = 400

TEMPLATE = """\
{%- if tools %}{# calls are written as <tool_call>{...}</tool_call> #}<|im_start|>tools
{{ tools | tojson }}<|im_end|>
{% endif -%}
{%- for message in (messages[-1:] if forget else messages) -%}
{%- if message.content == "forbidden" %}{{ raise_exception("no such talk") }}{% endif -%}
<|im_start|>{{ message.role }}
{{ message.content | trim if trims else message.content | upper if shouts else message.content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>{{ mood or "" }}assistant
{% endif -%}
"""


@cache
def chat_tokenizer(*marks: str) -> bytes:
    """The byte-level tokenizer with the special tokens of ChatML, and others."""
    tokenizer = tokenizers.Tokenizer.from_str(byte_level_json().decode())
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    assert [tokenizer.token_to_id(text) for text in ("<|im_start|>", "<|im_end|>")] == [START, END]
    tokenizer.add_special_tokens(list(marks))
    return tokenizer.to_str().encode()


def write_chat_bundle(
    folder: Path,
    *,
    template: str | None = TEMPLATE,
    more_templates: Mapping[str, str] | None = None,
    generation_config: Any = None,
    eos_token_ids: tuple[int, ...] = (END,),
    max_context: int = CONTEXT,
    marks: tuple[str, ...] = (),
    seed: int = 0,
) -> Path:
    """Write the bundle into the new folder `folder` and return it.

    `template` None leaves it out; `more_templates` are others by name; `generation_config` is what
    generation_config.json holds, bytes as they are.
    """
    companions = {} if template is None else {"chat_template.jinja": template.encode()}
    companions |= {f"chat_template.{name}.jinja": text.encode() for name, text in (more_templates or {}).items()}
    if generation_config is not None:
        as_is = isinstance(generation_config, bytes)
        companions["generation_config.json"] = generation_config if as_is else json.dumps(generation_config).encode()
    return write_bundle(
        folder,
        tokenizer=chat_tokenizer(*marks),
        eos_token_ids=eos_token_ids,
        max_context=max_context,
        seed=seed,
        companions=companions,
    )
