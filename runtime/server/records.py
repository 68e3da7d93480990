"""What the log and the metrics know of requests."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from starlette.requests import Request as HttpRequest

from satchel.runtime.generation.result import Generation
from satchel.runtime.server.models import Model
from satchel.runtime.util.terminal import printable


@dataclass
class Record:
    """One HTTP request: what it asked for, and the answers that were finished."""

    method: str
    path: str
    id: str = ""
    began: float = field(default_factory=time.monotonic)
    status: int = 0
    model: str = ""
    prompt: str = ""
    embedded: int = 0
    results: list[Generation] = field(default_factory=list)

    def asks(self, model: str, prompt: object) -> None:
        """Note the model, and the prompt unless it is None."""
        self.model, self.prompt = model, "" if prompt is None else str(prompt)

    def add(self, results: Sequence[Generation]) -> None:
        """Add answers that have ended."""
        self.results.extend(results)

    def line(self) -> str:
        """The line of the log."""
        parts = [f"{self.method} {printable(self.path)[:100]} {self.status}"]
        if self.model:
            parts.append(f"model {printable(self.model)}")
        if self.results:
            prompts, cached, new = totals(self.results)
            reasons = ",".join(sorted({result.finish_reason for result in self.results}))
            parts.append(f"prompt {prompts} ({cached} cached), new {new} ({reasons})")
        if self.embedded:
            parts.append(f"embedded {self.embedded}")
        parts.append(f"{time.monotonic() - self.began:.3f} s")
        parts.append(self.id)
        if self.prompt:
            parts.append(f"prompt {printable(self.prompt)}")
        return ", ".join(parts)


def record_of(http: HttpRequest) -> Record:
    """The record of a request, which the guard has made."""
    found: Record = http.state.record
    return found


def totals(results: Iterable[Generation]) -> tuple[int, int, int]:
    """The numbers of prompt tokens, of those that were cached, and of new tokens."""
    results = list(results)
    return (
        sum(result.prompt_tokens for result in results),
        sum(result.reused_tokens for result in results),
        sum(result.new_tokens for result in results),
    )


COUNTERS = {
    "prompt_tokens_total": "Prompt tokens that were fed.",
    "prompt_tokens_cached_total": "Prompt tokens that were in the prefix cache.",
    "prompt_seconds_total": "Seconds until first tokens.",
    "embedded_tokens_total": "Tokens of texts that became vectors.",
    "tokens_predicted_total": "New tokens.",
    "tokens_decoded_total": "New tokens after the first one of each answer.",
    "tokens_decoded_seconds_total": "Seconds for new tokens after the first one.",
    "tokens_drafted_total": "Tokens that were drafted by speculation.",
    "tokens_accepted_total": "Drafted tokens that were right.",
}


class Metrics:
    """Counts since the start, in the text format of Prometheus."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        self._statuses: Counter[tuple[str, int]] = Counter()

    def add(self, record: Record, known: bool) -> None:
        """Count a request that has ended; a path that is not `known` is no label."""
        self._statuses[record.path if known else "other", record.status] += 1
        self._counts["embedded_tokens_total"] += record.embedded
        for result in record.results:
            for name, value in {
                "prompt_tokens_total": result.prompt_tokens - result.reused_tokens,
                "prompt_tokens_cached_total": result.reused_tokens,
                "prompt_seconds_total": result.prefill_seconds,
                "tokens_predicted_total": result.new_tokens,
                "tokens_decoded_total": result.decode_steps,
                "tokens_decoded_seconds_total": result.decode_seconds,
                "tokens_drafted_total": result.drafted_tokens,
                "tokens_accepted_total": result.accepted_tokens,
            }.items():
                self._counts[name] += value

    def text(self, models: Iterable[Model]) -> str:
        """The page."""
        lines = []
        for name, what in COUNTERS.items():
            lines += [*_head(name, what, "counter"), f"satchel_{name} {self._counts[name]}"]
        lines += _head("requests_total", "HTTP requests that have ended.", "counter")
        for (path, status), count in sorted(self._statuses.items()):
            lines.append(f'satchel_requests_total{{path="{path}",status="{status}"}} {count}')
        loaded = list(models)
        for name, what, values in (
            ("requests_processing", "Requests that have a row.", [each.scheduler.running for each in loaded]),
            ("requests_deferred", "Requests that wait for a row.", [each.scheduler.waiting for each in loaded]),
            (
                "kv_cache_bytes",
                "Keys and values of requests and kept ones.",
                [each.scheduler.kv_bytes for each in loaded],
            ),
            (
                "requests_preempted",
                "Times that a request waited in a file.",
                [each.scheduler.preemptions for each in loaded],
            ),
            ("model_bytes", "About the memory of a loaded model.", [each.nbytes for each in loaded]),
        ):
            lines += _head(name, what, "gauge")
            lines += [
                f'satchel_{name}{{model="{_label(model.name)}"}} {value}'
                for model, value in zip(loaded, values, strict=True)
            ]
        return "\n".join(lines) + "\n"


def _head(name: str, what: str, kind: str) -> list[str]:
    return [f"# HELP satchel_{name} {what}", f"# TYPE satchel_{name} {kind}"]


def _label(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
