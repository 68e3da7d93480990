"""Generations as JSON values, for `--json` and JSON lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.sampling.logprobs import TokenLogprob
from satchel.runtime.generation.tokenizer import Tokenizer


def logprobs_json(
    ids: Iterable[int], entries: Iterable[TokenLogprob | None], tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """An object per token: its id, text, log-probability, and the most likely tokens at its place.

    An entry None, as for the first token of a prompt, gives null for the log-probability.
    """

    def one(token: int, logprob: float | None) -> dict[str, Any]:
        return {"id": token, "text": tokenizer.text_of(token), "logprob": logprob}

    return [
        {
            **one(token, entry.logprob if entry else None),
            "top": [one(*likely) for likely in (entry.top if entry else ())],
        }
        for token, entry in zip(ids, entries, strict=True)
    ]


def single_json(result: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    """The single continuation of a prompt, with its figures."""
    return {
        **_text_json(result, tokenizer),
        "prompt_tokens": result.prompt_tokens,
        "reused_tokens": result.reused_tokens,
        "new_tokens": result.new_tokens,
        **_figures_json(result, result.decode_speed, result.kv_bytes),
    }


def several_json(results: Sequence[Generation], tokenizer: Tokenizer) -> dict[str, Any]:
    """Several continuations of one prompt, as "samples", with their total figures."""
    return {
        "samples": [_text_json(result, tokenizer) | _score_json(result) for result in results],
        "prompt_tokens": results[0].prompt_tokens,
        "reused_tokens": results[0].reused_tokens,
        "new_tokens": sum(result.new_tokens for result in results),
        **_figures_json(results[0], decode_speed(results), sum(result.kv_bytes for result in results)),
        "decode_seconds": max(result.decode_seconds for result in results),
    }


def answer_json(identity: str | int, result: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    """The row of JSON lines that answers a prompt, without its "request"."""
    row = {
        "id": identity,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": result.new_tokens,
    }
    return row | _logprobs_of(result, tokenizer)


def decode_speed(results: Sequence[Generation]) -> float:
    """Decode steps per second, summed over all continuations of one prompt; 0 if there was none.

    Samples have their own steps; each text of a beam search has those of the whole search.
    """
    if results[0].score is not None:
        return results[0].decode_speed
    seconds = max(result.decode_seconds for result in results)
    return sum(result.decode_steps for result in results) / seconds if seconds else 0.0


def _text_json(result: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    texts = {"text": result.text, "token_ids": list(result.token_ids), "finish_reason": result.finish_reason}
    return texts | _logprobs_of(result, tokenizer)


def _logprobs_of(result: Generation, tokenizer: Tokenizer) -> dict[str, Any]:
    if result.logprobs is None:
        return {}
    return {"logprobs": logprobs_json(result.token_ids, result.logprobs, tokenizer)}


def _score_json(result: Generation) -> dict[str, Any]:
    return {} if result.score is None else {"score": result.score}


def _figures_json(result: Generation, speed: float, kv_bytes: int) -> dict[str, Any]:
    return {
        "prefill_seconds": result.prefill_seconds,
        "decode_seconds": result.decode_seconds,
        "prefill_tokens_per_second": result.prefill_speed,
        "decode_tokens_per_second": speed,
        "kv_bytes": kv_bytes,
        "drafted_tokens": result.drafted_tokens,
        "accepted_tokens": result.accepted_tokens,
    }
