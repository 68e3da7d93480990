"""Opens a checkpoint folder in the layout of transformers' `save_pretrained`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig, __version__
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from satchel.export.checkpoint import adapters
from satchel.export.checkpoint.adapters import base_of
from satchel.export.checkpoint.companions import folder_companions, read_json, with_names
from satchel.export.checkpoint.conversion import convert
from satchel.export.checkpoint.multimodal import language_model, left_out, of_other_parts
from satchel.export.checkpoint.placing import on_ties, on_unplaced, placed
from satchel.export.checkpoint.quantized import not_followed, read_quantized, settings_of, turned
from satchel.export.checkpoint.record import Checkpoint
from satchel.export.checkpoint.shards import NAMED, read_folder, weight_files
from satchel.export.checkpoint.special_ids import special_ids
from satchel.export.checkpoint.structure import Implementations, build_structure, one_line
from satchel.export.checkpoint.templates import folder_templates, template_sources
from satchel.export.checkpoint.ties import checked, tie
from satchel.export.checkpoint.tokenizer import check_vocabulary, chosen_tokenizer, folder_tokenizer, tokenizer_files
from satchel.export.errors import ExportError
from satchel.export.tracing.rotary_tables import rope_kinds

UNLIMITED = 1 << 20
"""The context length in tokens of a model whose layers all keep a state of fixed size, if its config has none."""


def open_huggingface(
    folder: Path, implementations: Implementations, tokenizer: Path | None, layout: str | None = None
) -> Checkpoint:
    """Open a folder with config.json and safetensors or `.bin` weights; see `open_checkpoint` for the arguments.

    Raises:
        ExportError: If the folder is incomplete or damaged, or satchel cannot export the model.
    """
    table = _config_table(folder, layout)
    settings = settings_of(folder, table)
    stored, stored_bytes = read_folder(folder, table.get(NAMED))
    stored = read_quantized(stored, settings, str(folder))
    outer = _config(folder, table, layout)
    config = language_model(outer, str(folder))
    module = build_structure(config, implementations, str(folder))
    stored, notes = placed(module, stored, folder)
    unplaced: list[str] = []
    weights = turned(module, convert(module, stored, str(folder), unplaced))
    if config is not outer:
        parts = of_other_parts(module, unplaced)
        unplaced = [name for name in unplaced if name not in parts]
        notes = [left_out(outer.model_type, config.model_type, parts.values())]
    notes += on_unplaced(module, unplaced, folder, strict=layout is not None)
    notes += on_ties(tie(module, weights))
    weights = checked(module, weights, str(folder))

    vocab_size = int(config.vocab_size)
    files = folder_tokenizer(folder) if tokenizer is None else chosen_tokenizer(tokenizer)
    if files is not None:
        check_vocabulary(files, vocab_size, str(folder))
    # The config class fills in default ids (Llama: 1 and 2), so they are only used without a tokenizer.
    last = vars(files) if files is not None else config.to_dict()
    companions = folder_companions(folder) | folder_templates(folder)
    inner = table.get("text_config") if config is not outer else None
    tables = [read_json(folder / "generation_config.json"), table, inner if isinstance(inner, dict) else {}, last]
    ids = special_ids(tables)
    checkpoint = Checkpoint(
        kind="huggingface",
        name=folder.resolve().name,
        model_type=config.model_type,
        module=module,
        weights=weights,
        vocab_size=vocab_size,
        max_context=_max_context(config, folder),
        bos_token_id=ids.bos,
        eos_token_ids=ids.eos,
        pad_token_id=ids.pad,
        stored_bytes=stored_bytes,
        tokenizer=files,
        companions=with_names(companions, {} if files is None else files.names),
        sources=_sources(folder, table.get(NAMED)),
        notes=(*notes, *not_followed(settings), *_code_note(table)),
    )
    return _with_own_adapter(checkpoint, folder)


def _with_own_adapter(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """Merge the adapter that lies beside the weights, as transformers applies it."""
    if not (folder / adapters.CONFIG).is_file():
        return checkpoint
    note = (
        f"the adapter in the same folder ({adapters.CONFIG}) was merged into the weights, as transformers applies it; "
        "if the weights contain it already, move its files away and export again"
    )
    return dataclasses.replace(adapters.with_adapters(checkpoint, [folder]), notes=(*checkpoint.notes, note))


def _code_note(table: dict[str, Any]) -> tuple[str, ...]:
    if not table.get("auto_map"):
        return ()
    return ("config.json names code of its own (auto_map); satchel runs none of it, and took transformers' own model",)


def _sources(folder: Path, named: object) -> tuple[Path, ...]:
    """Return the files of a folder that an export reads, sorted; including its tokenizer even if another is used."""
    beside = [*folder_companions(folder).values(), *template_sources(folder)]
    files = {folder / "config.json", *weight_files(folder, named), *tokenizer_files(folder), *beside}
    return tuple(sorted(files))


def _config_table(folder: Path, layout: str | None) -> dict[str, Any]:
    """Read config.json, and check it before transformers acts on it."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ExportError(
                f"{folder}: holds an adapter only; merge it while exporting its base: "
                f"satchel export {base_of(folder)} --adapter {folder}"
            )
        raise ExportError(f"{path}: no such file; pass the folder that save_pretrained or `hf download` wrote")
    table = read_json(path)
    model_type = table.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ExportError(
            f"{path}: has no model_type, so the architecture is unknown; use the config of the original model"
        )
    if layout is not None:
        if model_type in CONFIG_MAPPING and model_type != layout:
            raise ExportError(
                f"{path}: model_type {model_type!r} is known to transformers, so --as {layout} does not go with it"
            )
        if layout not in CONFIG_MAPPING:
            raise ExportError(f"--as {layout}: not a model_type of transformers; give one, such as llama")
        return table
    if model_type not in CONFIG_MAPPING:
        wants_code = (
            "needs code from the checkpoint, which satchel does not run"
            if table.get("auto_map")
            else f"is unknown to the installed transformers {__version__}"
        )
        raise ExportError(
            f"{path}: model_type {model_type!r} {wants_code}; export an architecture that is part of transformers, "
            "or name one with the same tensors, such as --as llama"
        )
    return table


def _config(folder: Path, table: dict[str, Any], layout: str | None) -> PreTrainedConfig:
    try:
        if layout is not None:
            settings = {k: v for k, v in table.items() if k not in ("model_type", "auto_map", "architectures")}
            return AutoConfig.for_model(layout, **settings)
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (ValueError, TypeError, KeyError, AttributeError, OSError, StrictDataclassError) as error:
        raise ExportError(f"{folder / 'config.json'}: transformers cannot load it: {one_line(error)}") from None
    return config


def _max_context(config: PreTrainedConfig, folder: Path) -> int:
    for name in ("max_position_embeddings", "n_ctx", "max_seq_len", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return max(value, _extended(config, value))
    if set(getattr(config, "layer_types", None) or ()) == {"linear_attention"}:
        return UNLIMITED
    raise ExportError(f"{folder / 'config.json'}: does not specify the context length; add max_position_embeddings")


def _extended(config: PreTrainedConfig, positions: int) -> int:
    """The context to which rotary scaling extends one of `positions`; 0 where it does not say.

    The factor of llama3 and linear does not multiply the context: max_position_embeddings has the extended length.
    """
    found = [0]
    for rope in rope_kinds(config).values():
        factor, kind = rope.get("factor"), rope.get("rope_type")
        original = positions if kind == "dynamic" else rope.get("original_max_position_embeddings")
        scaled = kind in ("yarn", "longrope", "dynamic")
        if scaled and isinstance(factor, int | float) and isinstance(original, int):
            found.append(int(factor * original))
    return max(found)
