"""Errors of the bundle format, and the base of all errors that a user can cause.

Each message is one line: what was found, where, and what to do.
"""

from __future__ import annotations


class SatchelError(Exception):
    """Base of all errors that a user can correct; the command line prints it and exits with `exit_code`."""

    exit_code = 2


class SatchelWarning(UserWarning):
    """A warning for the user; the command line prints it as one line."""


class BundleError(SatchelError):
    """A bundle is missing, damaged, of another version, or not to be trusted."""
