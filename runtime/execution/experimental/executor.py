"""The one way into this package: what runs bundles on devices, and static graphs, which no device has run yet."""

from __future__ import annotations

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.experimental.captured import CapturedEngine
from satchel.runtime.execution.experimental.static import StaticEngine
from satchel.runtime.ort.session import SessionSettings


def open_experimental(bundle: Bundle, settings: SessionSettings) -> Engine:
    """Open a bundle with static graphs, on any provider, or with dynamic graphs on a device.

    Raises BundleError and ProviderError.
    """
    return CapturedEngine(bundle, settings) if bundle.manifest.static is None else StaticEngine(bundle, settings)
