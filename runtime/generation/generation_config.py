"""Reads a checkpoint's generation_config.json: which of its keys are followed, and what is wrong with them.

Values are judged after the options that a user gives, which replace them. A wrong one is named and left out.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, SatchelWarning
from satchel.runtime.generation.sampling.options import DRAW_ONLY
from satchel.runtime.generation.sampling.table import BY_FIELD, Option, shown
from satchel.runtime.generation.sampling.token_rules import ids_in

FILE = "generation_config.json"
TRANSFORMERS_TOP_K = 50  # the default of transformers if generation_config.json has no top_k

TOKEN_RULES = (
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_bos_token_id",
    "forced_eos_token_id",
)  # fmt: skip
"""Options that say which tokens may come at all, rather than how to choose among them."""

ALWAYS = (
    *TOKEN_RULES, "repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "min_length",
    "exponential_decay_length_penalty", "renormalize_logits", "remove_invalid_values",
)  # fmt: skip
"""Keys that are options of the same name, and count for greedy decoding too."""
DRAWING = ("temperature", *(field for field in DRAW_ONLY if field != "seed"))
"""Keys that are options of the same name, and count if `do_sample` is true."""

OWN_OPTIONS = {
    "stop_strings": Option("stop", tuple, "", "", "", read=lambda value: _texts(value)),
    "max_new_tokens": Option("max_new_tokens", int, "", "", "1 or more", lambda value: value >= 1),
    "max_time": Option("time_limit", float, "", "", "seconds, above 0", lambda value: value > 0),
}
"""Keys that are other options of a request."""

NOT_FOLLOWED: Mapping[str, tuple[Any, str]] = {
    "max_length": (20, "--max-new-tokens limits an answer"),
    "num_beams": (1, "run --beams searches"),
    "num_return_sequences": (1, "run --num-return-sequences samples several"),
    "guidance_scale": (1, ""),
    "watermarking_config": (None, ""),
    "encoder_repetition_penalty": (1, ""),
    "encoder_no_repeat_ngram_size": (0, ""),
    "forced_decoder_ids": (None, ""),
    "diversity_penalty": (0, ""),
    "num_beam_groups": (1, ""),
    "constraints": (None, ""),
    "force_words_ids": (None, ""),
    "penalty_alpha": (None, ""),
    "dola_layers": (None, ""),
    "token_healing": (False, ""),
}
"""Keys that change what transformers generates, with its default, and what to use instead."""

WITHOUT_EFFECT = (
    "do_sample", "early_stopping", "length_penalty", "use_mtp", "use_cache", "cache_implementation",
    "cache_config", "max_cache_len", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id",
    "decoder_start_token_id", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
    "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight",
    "speculation_type", "compile_config", "disable_compile", "continuous_batching_config", "low_memory",
    "prefill_chunk_size", "_from_model_config", "transformers_version", "seed",
)  # fmt: skip
"""Keys that change no token here, or that the manifest has."""


def read_stored(bundle: Bundle) -> dict[str, Any]:
    """A bundle's generation_config.json; empty if it has none. Raises BundleError if it is not a JSON object."""
    if FILE not in bundle.manifest.files:
        return {}
    try:
        document = json.loads(bundle.read(FILE))
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise BundleError(f"{bundle.folder / FILE}: not a JSON object: export the bundle again")
    return document


def stored_rules(bundle: Bundle, given: Mapping[str, Any], *, beams: bool = False) -> dict[str, Any]:
    """The checkpoint's options that hold for every text, chat or not, but for those that `given` replaces.

    They are the tokens that may never come, or must, and the stop strings. A search with `beams` has no stop strings: a
    SatchelWarning names those left out. Warns as `stored_options` does. Raises BundleError if the file is not a JSON
    object.
    """
    keys = (*TOKEN_RULES, "stop_strings") if bundle.manifest.tokenizer else TOKEN_RULES
    document = read_stored(bundle)
    stored = {key: document[key] for key in keys if key in document}
    found = stored_options(stored, given, bundle.manifest.model.vocab_size)
    if beams and (texts := found.pop("stop", ())):
        names = ", ".join(map(shown, texts))
        warnings.warn(
            f"{FILE}: stop_strings {names}: left out: --beams does not end at texts", SatchelWarning, stacklevel=2
        )
    return found


def stored_options(
    document: Mapping[str, object], given: Mapping[str, Any], vocabulary: int | None = None
) -> dict[str, Any]:
    """The options of a parsed file, by field of `GenerationOptions`, but for those that `given` replaces.

    A given temperature replaces `do_sample` too: without sampling, what counts only then is not read. `vocabulary` is
    the number of token ids. A wrong value is left out, with a SatchelWarning that names the file and the key.
    """
    found: dict[str, Any] = {}
    for _, field, value, wrong in _judged(document, given, vocabulary):
        if wrong is not None:
            warnings.warn(f"{FILE}: {wrong}", SatchelWarning, stacklevel=2)
        if value is not None:
            found[field] = value
    # The file's own bounds give way to those of the user.
    both = {**found, **given}
    least, most = both.get("min_new_tokens", 0), both.get("max_new_tokens")
    if most is not None and isinstance(most, int) and isinstance(least, int) and least > most:
        if "min_new_tokens" in found:
            found["min_new_tokens"] = max(most, 0)
        else:
            found["max_new_tokens"] = least
    return found


def complaints(document: Mapping[str, object], vocabulary: int) -> list[str]:
    """What is to be said about a file when its checkpoint is exported: each wrong value, and the keys not followed."""
    found = [wrong for _, _, _, wrong in _judged(document, {}, vocabulary) if wrong is not None]
    ignored = []
    for key, value in document.items():
        default, instead = NOT_FOLLOWED.get(key, (None, ""))
        known = key in WITHOUT_EFFECT or key in ALWAYS or key in DRAWING or key in OWN_OPTIONS
        if not known and value is not None and value != default:
            ignored.append(f"{key} {shown(value)}" + (f" ({instead})" if instead else ""))
    if ignored:
        found.append("not followed: " + ", ".join(ignored))
    return found


def without_wrong(document: Mapping[str, object], vocabulary: int) -> dict[str, object]:
    """The file without its wrong values."""
    wrong = {key for key, _, _, wrong in _judged(document, {}, vocabulary) if wrong is not None}
    return {key: value for key, value in document.items() if key not in wrong}


def _judged(
    document: Mapping[str, object], given: Mapping[str, Any], vocabulary: int | None
) -> Iterator[tuple[str, str, Any, str | None]]:
    """Each key that counts: its name, the field, the value (None for none), and what is wrong with the stored one."""
    samples = document.get("do_sample")
    if "temperature" in given:
        samples = samples is True and given["temperature"] != 0
    elif samples is not None and not isinstance(samples, bool):
        yield "do_sample", "", None, f"do_sample {shown(samples)}: must be true or false{_advice('temperature')}"
        samples = False
    defaults = {"temperature": 1.0, "top_k": TRANSFORMERS_TOP_K} if samples else {}
    options = {key: BY_FIELD[key] for key in (*ALWAYS, *(DRAWING if samples else ()))} | OWN_OPTIONS
    for key, option in options.items():
        value = document.get(key)
        value = defaults.get(key) if value is None else value
        if value is None or option.field in given:
            continue
        wrong = option.complaint(value)
        if wrong is None and key == "temperature" and value == 0:
            wrong = " 0: must be above 0 if do_sample is true"
        if wrong is None:
            read = option.kind if option.read is None else option.read
            value = read(value)
            beyond = [] if vocabulary is None else [id for id in _ids(option.field, value) if id >= vocabulary]
            wrong = f": token id {beyond[0]} is outside the vocabulary of {vocabulary} ids" if beyond else None
        if wrong is None:
            yield key, option.field, value, None
        else:
            yield key, option.field, defaults.get(key), f"{key}{wrong}{_advice(option.field)}"


def _ids(field: str, value: object) -> Iterator[int]:
    return ids_in(field, value) if field in TOKEN_RULES else iter(())


def _advice(field: str) -> str:
    flag = "--" + field.replace("_", "-")
    return f": give {flag}, or correct the file in the checkpoint and export it again; now it is left out"


def _texts(value: object) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("a text or a list of texts, none of them empty")
    return tuple(texts)
