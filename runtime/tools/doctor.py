"""Checks an installation, the machine and optionally a bundle: what is installed, and what will run."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from satchel.runtime.errors import BundleError, SatchelError, SatchelWarning
from satchel.runtime.ort.providers import check_installed, check_target
from satchel.runtime.util import cpu, kl, requirements
from satchel.runtime.util.memory import system_memory
from satchel.runtime.util.sizes import decimal

if TYPE_CHECKING:
    from satchel.runtime.bundle.certificate import Certificate
    from satchel.runtime.bundle.manifest import Manifest
    from satchel.runtime.bundle.reader import Bundle
    from satchel.runtime.ort.providers import ProviderChoice

TESTED_ONNXRUNTIME = ("1.30.0", "1.32.0")
"""The oldest and the newest ONNX Runtime that satchel was tested with."""

GIB = 1 << 30


@dataclass(frozen=True)
class Finding:
    """The result of one check: its name, a text for people, facts for programs, and whether it works."""

    name: str
    text: str
    facts: dict[str, Any]
    works: bool = True


def examine(bundle: str | None = None) -> Iterator[Finding]:
    """Run all checks. Broken parts are findings, not errors."""
    yield _satchel()
    yield _onnxruntime()
    features = cpu.processor_features()
    yield Finding(
        "processor",
        f"{cpu.processor_name()} ({features[0]}: {', '.join(features[1:]) or 'no known extensions'})",
        {"name": cpu.processor_name(), "features": list(features)},
    )
    yield _threads()
    yield _memory()
    yield _kernels()
    yield _extras()
    yield _cache()
    if bundle is not None:
        yield from _bundle(bundle)


def check_provider(choice: ProviderChoice, bundle: str | None = None) -> None:
    """Raise ProviderError if a provider is not installed, or does not run this bundle. One that does not open is a
    finding, and so is an ONNX Runtime that does not load.
    """
    from satchel.runtime.bundle.reader import read_bundle

    if bundle is not None:
        with contextlib.suppress(BundleError):
            check_target(choice, read_bundle(bundle).manifest.target)
    found = _onnxruntime()
    if found.facts["providers"]:
        check_installed(choice, found.facts["providers"])


def phases(bundle: Bundle) -> dict[str, str]:
    """The graphs and kernels of prefill and decode of an opened bundle on this machine, in words."""
    made = bundle.specialized
    if made is None:
        return dict.fromkeys(("prefill", "decode"), "portable graphs, ONNX Runtime's kernels")
    return {phase: _runs(bundle.manifest, made.variant(phase)) for phase in ("prefill", "decode")}


def _runs(manifest: Manifest, name: str | None) -> str:
    if name is None:
        return "ONNX Runtime's kernels, weights as stored"
    variant = manifest.variant(name)
    kernels = "ONNX Runtime's" if variant.kernel_abi is None else "satchel's"
    return f"{kernels} kernels, weights as {variant.weights.layout}"


def _satchel() -> Finding:
    try:
        version = metadata.version("satchel")
    except metadata.PackageNotFoundError:
        version = "not installed"
    missing = [each.name for each in requirements.missing(None)]
    text = f"{version}, Python {platform.python_version()}"
    if missing:
        text += f"; missing: pip install {' '.join(missing)}"
    return Finding("satchel", text, {"version": version, "python": platform.python_version(), "missing": missing})


def _onnxruntime() -> Finding:
    oldest, newest = TESTED_ONNXRUNTIME
    try:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
    except Exception as error:  # noqa: BLE001  # any reason why it does not load is reported
        text = f"does not load ({' '.join(str(error).split())}): pip install --force-reinstall onnxruntime"
        return Finding("onnxruntime", text, {"version": None, "tested": False, "providers": []}, works=False)
    version = onnxruntime.__version__
    tested = _number(oldest) <= _number(version) <= _number(newest)
    names = [name.removesuffix("ExecutionProvider") for name in providers]
    text = f"{version} ({'within' if tested else 'outside'} the tested range, {oldest} to {newest})"
    facts = {"version": version, "tested": tested, "tested_range": [oldest, newest], "providers": providers}
    works = _number(version) >= _number(oldest)
    return Finding("onnxruntime", f"{text}, providers: {', '.join(names)}", facts, works)


def _threads() -> Finding:
    cores, usable = cpu.machine_cores(), cpu.usable_cpus()
    text = f"{cores} physical cores, {os.cpu_count()} logical CPUs, {usable} of them for this process"
    return Finding("cores", text, {"cores": cores, "logical": os.cpu_count(), "usable": usable})


def _memory() -> Finding:
    total, available = system_memory()
    parts = [
        "unknown on this system" if total is None else f"{total / GIB:.1f} GiB",
        "the available part is unknown on this system" if available is None else f"{available / GIB:.1f} GiB available",
    ]
    return Finding("memory", ", ".join(parts[: 1 if total is None else 2]), {"total": total, "available": available})


def _kernels() -> Finding:
    from satchel.runtime.kernels import library

    try:
        reason, chosen, works = library.reason(), library.instruction_set(), True
    except SatchelError as error:
        reason, chosen, works = str(error), None, False
    text = f"built, and run on this processor ({chosen})" if reason is None else f"not used: they {reason}"
    facts = {"run": reason is None, "reason": reason, "instruction_set": chosen}
    return Finding("kernels", f"satchel's own: {text if works else reason}", facts, works)


def _extras() -> Finding:
    parts, facts = [], {}
    for extra in requirements.EXTRAS:
        facts[extra] = not requirements.missing(extra)
        parts.append(f"{extra} installed" if facts[extra] else f"{extra}: {requirements.install_command(extra)}")
    return Finding("extras", "; ".join(parts), facts)


def _cache() -> Finding:
    from satchel.runtime.bundle.hash_cache import cache_folder

    folder = cache_folder()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
    return Finding("cache", f"{folder}, {decimal(size)}", {"folder": str(folder), "bytes": size})


def _bundle(path: str) -> Iterator[Finding]:
    from satchel.runtime.execution.kv_cache import position_bytes
    from satchel.runtime.ort import machine
    from satchel.runtime.ort.open_bundle import open_bundle

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SatchelWarning)
            bundle = open_bundle(path)
    except SatchelError as error:
        yield Finding("bundle", str(error), {"path": path, "error": str(error)}, works=False)
        return
    manifest = bundle.manifest
    weights = sum(record.bytes for record in manifest.files.values())
    cache = position_bytes(bundle.kv_cache) * manifest.model.max_context + manifest.state_bytes
    facts: dict[str, Any] = {
        "path": path, "target": manifest.target, "precision": manifest.precision, "bytes": weights,
        "cache_bytes": cache, "max_context": manifest.model.max_context, "fits": None,
    }  # fmt: skip
    text = (
        f"target {manifest.target}, precision {manifest.precision}, {decimal(weights)}, and up to "
        f"{decimal(cache)} of {'KV cache and states' if manifest.states else 'KV cache'}"
    )
    available = _memory().facts["available"]
    if available is not None:
        facts["fits"] = weights + cache <= available
        text += f": {'fits into' if facts['fits'] else 'more than'} the available memory"
    yield Finding("bundle", text, facts)
    if manifest.certificate is not None:
        yield _certificate(manifest.certificate)
    runs, made = phases(bundle), bundle.specialized is not None
    failure = "" if made else machine.attempts(bundle)[1]
    reasons = [str(warning.message) for warning in caught]
    reason = "; ".join([*reasons, f"optimizing it in the background failed: {failure}"] if failure else reasons)
    text = "specialized for this machine" if made else "not specialized for this machine"
    text += ": " if bundle.folder == Path(path) else ", by a copy in the user's cache: "
    text += f"prefill runs {runs['prefill']}; decode runs {runs['decode']}"
    if reason or (not made and manifest.target == "cpu"):
        text += f" ({reason or f'faster after: satchel specialize {path}'})"
    yield Finding("speed", text, {"specialized": made, **runs, "reason": reason or None})


def _certificate(certificate: Certificate) -> Finding:
    phases = {"prefill": certificate.prefill, "decode": certificate.decode}
    facts = {name: {"kl_mean": phase.kl_mean, "top1": phase.top1} for name, phase in phases.items()}
    measured = [(name, phase.kl_mean, phase.top1) for name, phase in phases.items() if phase.kl_mean is not None]
    text = ", ".join(f"mean KL {mean:.5f} in {name} (same top token {top1 or 0:.1%})" for name, mean, top1 in measured)
    if measured:
        text += f": {kl.grade(max(mean for _, mean, _ in measured))}"
    return Finding("certificate", text or "without a reference", facts)


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
