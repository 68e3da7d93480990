"""All user-correctable errors, to import from one place."""

from __future__ import annotations

from satchel.runtime.bundle.errors import BundleError, SatchelError, SatchelWarning

__all__ = ["BundleError", "PromptError", "ProviderError", "QueueFullError", "SatchelError", "SatchelWarning"]


class PromptError(SatchelError):
    """A prompt or generation request does not fit the bundle, such as a prompt longer than the context."""


class QueueFullError(SatchelError):
    """As many requests wait as may, or no further ones are taken: ask again later."""


class ProviderError(SatchelError):
    """The requested execution provider is unknown, not installed or does not start."""
