"""Manifests of earlier versions, brought to the present one: a step for each version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from satchel.runtime.errors import BundleError

OLDEST = 1


def upgraded(document: dict[str, Any], version: int, name: str) -> dict[str, Any]:
    """A parsed manifest as one of `version`; `name` is the file that messages name.

    The document itself stays as it is. Raises BundleError for a version that is newer, or none at all.
    """
    found = document.get("version")
    if type(found) is not int or not OLDEST <= found <= version:
        raise BundleError(
            f"{name}: bundle version {found!r}, but this satchel reads versions {OLDEST} to {version}: "
            "export the bundle again with this satchel, or install the satchel that made it"
        )
    for step in range(found, version):
        document = STEPS[step](document)
    return document


def _to_2(document: dict[str, Any]) -> dict[str, Any]:
    return {**document, "version": 2, "static": None, "provenance": None, "custom_ops": [], "plain": None}


STEPS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _to_2}
"""What turns a manifest of a version into one of the next."""
