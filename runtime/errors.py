"""All errors that a user can cause, in one place to import from."""

from __future__ import annotations

from satchel.runtime.bundle.errors import BundleError, SatchelError, SatchelWarning

__all__ = ["BundleError", "PromptError", "ProviderError", "SatchelError", "SatchelWarning"]


class PromptError(SatchelError):
    """A prompt or generation request does not fit the bundle, such as a prompt longer than the context."""


class ProviderError(SatchelError):
    """An execution provider that was asked for is not there."""
