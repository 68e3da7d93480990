"""Opens a checkpoint folder in the layout of transformers' `save_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from satchel.export.checkpoint.companions import folder_companions, read_json, with_names
from satchel.export.checkpoint.conversion import convert
from satchel.export.checkpoint.quantized import read_quantized, settings_of
from satchel.export.checkpoint.record import Checkpoint
from satchel.export.checkpoint.shards import read_folder, weight_files
from satchel.export.checkpoint.special_ids import special_ids
from satchel.export.checkpoint.structure import Implementations, build_structure, one_line
from satchel.export.checkpoint.templates import folder_templates, template_sources
from satchel.export.checkpoint.ties import checked, tie
from satchel.export.checkpoint.tokenizer import check_vocabulary, chosen_tokenizer, folder_tokenizer, tokenizer_files
from satchel.export.errors import ExportError


def open_huggingface(folder: Path, implementations: Implementations, tokenizer: Path | None) -> Checkpoint:
    """Open a folder with config.json and safetensors or `.bin` weights; see `open_checkpoint` for the arguments.

    Raises:
        ExportError: If the folder is incomplete or damaged, or satchel cannot export the model.
    """
    table = _config_table(folder)
    settings = settings_of(folder, table)
    stored, stored_bytes = read_folder(folder)
    stored = read_quantized(stored, settings, str(folder))
    config = _config(folder)
    module = build_structure(config, implementations, str(folder))
    weights = convert(module, stored, str(folder))
    tie(module, weights)
    weights = checked(module, weights, str(folder))

    vocab_size = int(config.vocab_size)
    files = folder_tokenizer(folder) if tokenizer is None else chosen_tokenizer(tokenizer)
    if files is not None:
        check_vocabulary(files, vocab_size, str(folder))
    # The config class fills in default ids (Llama: 1 and 2), so they are only used without a tokenizer.
    last = vars(files) if files is not None else config.to_dict()
    companions = folder_companions(folder) | folder_templates(folder)
    ids = special_ids([read_json(folder / "generation_config.json"), table, last])
    return Checkpoint(
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
        sources=_sources(folder),
    )


def _sources(folder: Path) -> tuple[Path, ...]:
    """Return the files of a folder that an export reads, sorted; including its tokenizer even if another is used."""
    beside = [*folder_companions(folder).values(), *template_sources(folder)]
    files = {folder / "config.json", *weight_files(folder), *tokenizer_files(folder), *beside}
    return tuple(sorted(files))


def _config_table(folder: Path) -> dict[str, Any]:
    """Read config.json, and check it before transformers acts on it."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ExportError(
                f"{folder}: holds an adapter (LoRA) only; merge it into its base model first "
                "(peft: merge_and_unload, then save_pretrained) and export the merged folder"
            )
        raise ExportError(f"{path}: no such file; pass the folder that save_pretrained or `hf download` wrote")
    table = read_json(path)
    model_type = table.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise ExportError(
            f"{path}: has no model_type, so the architecture is unknown; use the config of the original model"
        )
    if model_type not in CONFIG_MAPPING:
        wants_code = (
            "needs code from the checkpoint, which satchel does not run" if table.get("auto_map") else "is unknown"
        )
        raise ExportError(
            f"{path}: model_type {model_type!r} {wants_code}; export an architecture that is part of transformers"
        )
    return table


def _config(folder: Path) -> PreTrainedConfig:
    try:
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
            return value
    raise ExportError(f"{folder / 'config.json'}: does not specify the context length; add max_position_embeddings")
