"""A trial of a bundle on this machine: placement, accuracy and speed, as findings that can be sent to somebody else."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import SatchelError, SatchelWarning
from satchel.runtime.execution.engine import Engine
from satchel.runtime.ort.providers import PROVIDERS, ProviderChoice
from satchel.runtime.tools.bench.benchmark import Summary, Workload, summarize, timed_run, warm_up
from satchel.runtime.tools.doctor import Finding

TEMPLATE = "trial.html.jinja"
LENGTHS = (128, 512, 2048)
"""Prompt lengths that are timed; in a smaller context an eighth, a quarter and half of it."""

NEW_TOKENS, BATCH, RUNS = 32, 4, 3


def try_bundle(bundle: Bundle, choice: ProviderChoice, threads: int | None) -> Iterator[Finding]:
    """Open a bundle on a provider, replay its certificate, and time both phases at three lengths and with a batch.

    Each step is a finding. A step that fails says why, which names the graph or the node, and ends the trial.
    """
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SatchelWarning)
        try:
            engine = Engine.open(bundle, choice, threads)
        except SatchelError as error:
            yield _failure("placement", error)
            return
    yield _placement(choice, [str(warning.message) for warning in caught], time.perf_counter() - start)
    for name, step in (("accuracy", _accuracy), ("timing", _timing)):
        try:
            yield from step(engine)
        except SatchelError as error:
            yield _failure(name, error)
            return


def lengths_of(manifest: Manifest) -> tuple[int, ...]:
    """The prompt lengths that a trial of this bundle times."""
    most = manifest.model.max_context - NEW_TOKENS
    return LENGTHS if most >= LENGTHS[-1] else tuple(sorted({max(most // part, 1) for part in (8, 4, 2)}))


def as_json(findings: Iterable[Finding]) -> str:
    """The facts of all findings, as JSON for programs."""
    facts = {
        finding.name: {"works": finding.works, "text": finding.text, **finding.facts} for finding in shared(findings)
    }
    return json.dumps({"works": all(facts[name]["works"] for name in facts), **facts}, indent=1) + "\n"


def as_page(findings: Iterable[Finding], title: str) -> str:
    """The findings as a page of its own, for people."""
    import jinja2

    text = resources.files("satchel.runtime.evaluation").joinpath(TEMPLATE).read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(text)
    rows = shared(findings)
    return template.render(title=title, findings=rows, works=all(finding.works for finding in rows))


def shared(findings: Iterable[Finding]) -> list[Finding]:
    """What may leave this machine: the bundle by its name, and no folder of its user."""
    found = [finding for finding in findings if finding.name != "cache"]
    paths = [str(path) for finding in found for name, path in finding.facts.items() if name == "path"]

    def bare(value: Any) -> Any:
        for path in paths if isinstance(value, str) else ():
            value = value.replace(path, Path(path).name)
        return value

    return [
        replace(finding, text=bare(finding.text), facts={name: bare(fact) for name, fact in finding.facts.items()})
        for finding in found
    ]


def _placement(choice: ProviderChoice, complaints: list[str], seconds: float) -> Finding:
    provider = PROVIDERS[choice.name].ort_name
    text = f"{provider}, opened in {seconds:.1f} s; " + ("; ".join(complaints) or "no node on another provider")
    facts = {"provider": choice.name, "options": dict(choice.options), "load": seconds, "complaints": complaints}
    return Finding("placement", text, facts)


def _accuracy(engine: Engine) -> Iterator[Finding]:
    from satchel.runtime.evaluation.certify import mean_kl, mismatches, replay

    certificate = engine.bundle.manifest.certificate
    if certificate is None:
        yield Finding("accuracy", "not checked: the bundle has no certificate", {"recorded": None, "measured": None})
        return
    replays = [replay(engine, prompt) for prompt in certificate.prompts]
    lines = mismatches(certificate, replays)
    recorded, measured = mean_kl(certificate.prompts), mean_kl(replays)
    text = f"mean KL {measured:.5f}, recorded {recorded:.5f} over {len(replays)} prompts"
    text += f"; outside the margins: {'; '.join(lines)}" if lines else ": within the margins"
    yield Finding("accuracy", text, {"recorded": recorded, "measured": measured, "mismatches": lines}, works=not lines)


def _timing(engine: Engine) -> Iterator[Finding]:
    manifest = engine.bundle.manifest
    lengths = lengths_of(manifest)
    workloads = [Workload(length, NEW_TOKENS, manifest.model.vocab_size) for length in lengths]
    warm_up(engine, workloads[0])
    for workload in [*workloads, Workload(lengths[0], NEW_TOKENS, manifest.model.vocab_size, BATCH)]:
        yield _speed(workload, summarize([timed_run(engine, workload) for _ in range(RUNS)]))


def _speed(workload: Workload, summary: Summary) -> Finding:
    median = summary.median
    name = f"{workload.prompt_tokens} tokens" if workload.batch == 1 else f"{workload.batch} sequences"
    of = "" if workload.batch == 1 else f" of {workload.prompt_tokens} tokens"
    text = (
        f"prefill {median.prefill:,.1f} tokens/s, decode {median.decode:,.1f} tokens/s{of}, "
        f"first token after {median.ttft:.3f} s (median of {RUNS} runs)"
    )
    runs = {
        key: {"median": getattr(median, key), "lowest": getattr(summary.lowest, key),
              "highest": getattr(summary.highest, key)}
        for key in ("prefill", "decode", "ttft")
    }  # fmt: skip
    sizes = {"prompt_tokens": workload.prompt_tokens, "new_tokens": workload.new_tokens, "batch": workload.batch}
    return Finding(name, text, {**sizes, **runs})


def _failure(name: str, error: SatchelError) -> Finding:
    return Finding(name, str(error), {"error": str(error)}, works=False)
