"""The light runner: generates text from a bundle with numpy and ONNX Runtime. Importing it loads neither.

It does set ORT_DISABLE_TELEMETRY, unless the environment says otherwise: ONNX Runtime reads it when it is loaded, and
would write an identifier into the user's cache and try to send it.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from satchel.runtime.bundle.manifest import Manifest
    from satchel.runtime.bundle.reader import Bundle
    from satchel.runtime.errors import BundleError, PromptError, ProviderError, SatchelError
    from satchel.runtime.execution.engine import Engine
    from satchel.runtime.execution.state import State
    from satchel.runtime.generation.conversation import Conversation
    from satchel.runtime.generation.generator import Generator
    from satchel.runtime.generation.options import GenerationOptions
    from satchel.runtime.generation.request import Request
    from satchel.runtime.generation.result import Generation
    from satchel.runtime.generation.stream import TokenStream
    from satchel.runtime.ort.custom_ops import Custom
    from satchel.runtime.ort.open_bundle import open_bundle
    from satchel.runtime.ort.providers import ProviderChoice

__all__ = [
    "Bundle",
    "BundleError",
    "Conversation",
    "Custom",
    "Engine",
    "Generation",
    "GenerationOptions",
    "Generator",
    "Manifest",
    "PromptError",
    "ProviderChoice",
    "ProviderError",
    "Request",
    "SatchelError",
    "State",
    "TokenStream",
    "open_bundle",
]

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "Bundle": "bundle.reader",
    "open_bundle": "ort.open_bundle",
    "Conversation": "generation.conversation",
    "Custom": "ort.custom_ops",
    "Engine": "execution.engine",
    "ProviderChoice": "ort.providers",
    "State": "execution.state",
    "BundleError": "errors",
    "PromptError": "errors",
    "ProviderError": "errors",
    "SatchelError": "errors",
    "Generation": "generation.result",
    "GenerationOptions": "generation.options",
    "Generator": "generation.generator",
    "TokenStream": "generation.stream",
    "Request": "generation.request",
    "Manifest": "bundle.manifest",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
