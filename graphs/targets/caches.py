"""What layers keep of each token, as a choice of steps."""

from __future__ import annotations

import dataclasses

from satchel.graphs.ir.pipeline import Step
from satchel.graphs.passes.fuse.absorb_latent import absorb_latent

ABSORB, SHARE = "absorb_latent", "share_caches"
"""Names of passes."""


def with_caches(fuse: tuple[Step, ...], latent: str | None, shared: bool = True) -> tuple[Step, ...]:
    """`fuse` with the caches that are wanted.

    Args:
        fuse: The steps of a target.
        latent: The form of latent attention: compressed even where that is not smaller, expanded, or None for what is
            smaller.
        shared: Whether layers with the same keys and values have one cache.
    """
    left_out = {ABSORB} if latent == "expanded" else set[str]()
    left_out |= set() if shared else {SHARE}
    always = latent == "compressed"
    return tuple(
        dataclasses.replace(step, graph_pass=absorb_latent(always)) if step.name == ABSORB else step
        for step in fuse
        if step.name not in left_out
    )
