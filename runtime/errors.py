"""The errors that a user can cause. Each message is one line: what was found, where, and what to do."""

from __future__ import annotations


class SatchelError(Exception):
    """Base of every error that is the user's to mend; the command line prints it and exits with `exit_code`."""

    exit_code = 2


class SatchelWarning(UserWarning):
    """Something that the user should know and that stops nothing; the command line prints it as one line."""


class BundleError(SatchelError):
    """A bundle is missing, damaged, of another version, or not to be trusted."""


class PromptError(SatchelError):
    """A prompt or generation request does not fit the bundle, such as a prompt longer than the context."""


class ProviderError(SatchelError):
    """An execution provider that was asked for is not there."""
