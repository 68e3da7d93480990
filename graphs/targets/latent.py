"""The form in which latent attention keeps its tokens, as a choice of steps."""

from __future__ import annotations

import dataclasses

from satchel.graphs.ir.pipeline import Step
from satchel.graphs.passes.fuse.absorb_latent import absorb_latent

ABSORB = "absorb_latent"
"""The name of the pass."""


def with_latent(fuse: tuple[Step, ...], form: str | None) -> tuple[Step, ...]:
    """`fuse` for a form: compressed even where that is not smaller, expanded, or None for what is smaller."""
    if form == "expanded":
        return tuple(step for step in fuse if step.name != ABSORB)
    always = form == "compressed"
    return tuple(
        dataclasses.replace(step, graph_pass=absorb_latent(always)) if step.name == ABSORB else step for step in fuse
    )
