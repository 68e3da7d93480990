"""The final report of an export: size, accuracy and speed of the bundle, as one line or JSON."""

from __future__ import annotations

from typing import Any

from satchel.runtime.bundle.contract import WEIGHTS_NAME
from satchel.runtime.bundle.manifest import Manifest


def report(manifest: Manifest) -> dict[str, Any]:
    """Return the facts that an export reports about a bundle.

    `bytes` is the size of the bundle, and `bits_per_weight` the size of its weight file per model parameter. From the
    certificate, `kl`, `top1` and `perplexity_change` (relative to the float model) are for prefill, and `decode_kl` is
    for decode; `prefill` and `decode` are in tokens/s. These are None without a certificate, and speeds also if they
    were not measured.
    """
    certificate, parameters = manifest.certificate, manifest.model.parameters
    facts: dict[str, Any] = {
        "precision": manifest.precision,
        "parameters": parameters,
        "bytes": sum(file.bytes for file in manifest.files.values()),
        "bits_per_weight": 8 * manifest.files[WEIGHTS_NAME].bytes / parameters,
        "kl": None, "decode_kl": None, "top1": None, "perplexity_change": None, "prefill": None, "decode": None,
    }  # fmt: skip
    if certificate is None:
        return facts
    figures = certificate.prefill
    facts |= {"kl": figures.kl_mean, "decode_kl": certificate.decode.kl_mean, "top1": figures.top1}
    if figures.reference_perplexity:
        facts["perplexity_change"] = figures.perplexity / figures.reference_perplexity - 1
    if certificate.speed is not None:
        facts |= {"prefill": certificate.speed.prefill, "decode": certificate.speed.decode}
    return facts


def row(facts: dict[str, Any]) -> str:
    """Format the facts as one line."""
    parts = [
        f"{facts['bundle']}: {facts['precision']}",
        f"{facts['bytes'] / 1e6:,.1f} MB",
        f"{facts['bits_per_weight']:.2f} bits per weight",
    ]
    if facts["kl"] is not None:
        parts.append(f"KL {facts['kl']:.5f} (decode {facts['decode_kl']:.5f})")
        parts.append(f"top-1 {facts['top1']:.3f}")
        parts.append(f"perplexity {facts['perplexity_change']:+.2%}")
    if facts["prefill"] is not None:
        parts.append(f"prefill {facts['prefill']:,.0f} and decode {facts['decode']:,.0f} tokens/s")
    return ", ".join(parts) + f"; exported in {facts['seconds']:.1f} s"
