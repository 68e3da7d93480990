"""Figures of accuracy for people: how they are shown, what a KL means, and why texts may differ within it."""

from __future__ import annotations

FIGURES = (
    ("KL mean", "kl_mean", ".5f"),
    ("KL median", "kl_median", ".5f"),
    ("KL p90", "kl_p90", ".5f"),
    ("KL p99.9", "kl_p999", ".5f"),
    ("KL max", "kl_max", ".5f"),
    ("top-1", "top1", ".4f"),
    ("flips", "flips", ",d"),
    ("perplexity", "perplexity", ".6g"),
    ("reference's", "reference_perplexity", ".6g"),
)
"""The figures of a phase in the order of tables: label, field of `PhaseFidelity`, and format."""

KL_MEANING = (
    "KL is the divergence of the bundle's next-token probabilities from the reference's, in nats per token: "
    "0 is identical, lower is better"
)

GRADES = (
    (0.001, "indistinguishable from the reference"),
    (0.01, "very close to the reference, as good 8-bit weights are"),
    (0.15, "close to the reference, as 4-bit weights of a small model are"),
)
"""Upper bounds of a mean KL in nats, with its grade. SmolLM2-135M has about 0.004 at 8 bits and 0.1 at 4 bits."""

WORST_GRADE = "noticeably different from the reference"


def grade(kl: float) -> str:
    """Whether a mean KL is good, in words."""
    return next((text for bound, text in GRADES if kl < bound), WORST_GRADE)


def near_tie(prompt: int, token: int, gap: float, margin: float) -> str:
    """Why a continuation that differs from the recorded one from `token` on is within the certificate."""
    return (
        f"prompt {prompt}: the text differs from token {token} on, where the two most likely tokens were {gap:.2f} "
        f"logits apart, a near tie (below {margin:g})"
    )


NEAR_TIES = (
    "Kernels that add numbers in another order, such as those of a specialized bundle or another processor, may pick "
    "either token of a near tie; the text then goes on differently, and is as good by the KL above"
)
