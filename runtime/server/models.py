"""The models that are served: each is loaded when it is first asked for, and let go if memory is needed."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import cached_property
from typing import Any

from satchel.runtime.errors import SatchelError
from satchel.runtime.generation.conversation import checkpoint_options
from satchel.runtime.generation.driver import Driver
from satchel.runtime.generation.generation_config import stored_rules
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.prefix_cache import full_context_bytes
from satchel.runtime.server.errors import RequestError
from satchel.runtime.server.mail import Mail
from satchel.runtime.server.settings import MIB, Settings
from satchel.runtime.util.memory import release_freed


class Model:
    """A bundle that is loaded, and the thread that runs its requests."""

    def __init__(self, name: str, generator: Generator, settings: Settings) -> None:
        """Start the thread. Raises SatchelError for a bundle that cannot be served."""
        self.name = name
        self.generator = generator
        self.tokenizer = generator.need_tokenizer()
        bundle = generator.engine.bundle
        self.raw_options = GenerationOptions(**stored_rules(bundle, {}))
        self.chat_options = checkpoint_options(generator)
        self.fingerprint = bundle.fingerprint[:16]
        self.users = 0
        self.used = time.monotonic()
        self.mail: Mail[Any] = Mail()
        self.embedding = asyncio.Lock()  # of those who want vectors
        self.embedding_waits = 0
        self.nbytes = expected_bytes(generator, settings)
        self.scheduler = generator.scheduler(
            rows=settings.rows, queue_limit=settings.queue, kv_cache_mib=settings.kv_cache_mib
        )
        self._driver = Driver(self.scheduler)

    @cached_property
    def meta(self) -> dict[str, Any]:
        """What the manifest says of the bundle, and its certificate without the prompts."""
        manifest = self.generator.engine.bundle.manifest
        measured = None if manifest.certificate is None else asdict(manifest.certificate)
        return {
            "precision": manifest.precision,
            "context": self.generator.max_context,
            "vocabulary": self.generator.engine.vocabulary,
            "bytes": sum(record.bytes for record in manifest.files.values()),
            "certificate": measured and {key: value for key, value in measured.items() if key != "prompts"},
        }

    @property
    def alive(self) -> bool:
        """Whether requests can still run; a step that fails ends all of them."""
        return self._driver.alive

    def close(self, *, drain: bool) -> None:
        """End the thread, after its requests or, without `drain`, without their rest."""
        self._driver.close(drain=drain)
        if self.generator.has_template:
            self.generator.template.close()


class Models:
    """Models by name."""

    def __init__(self, paths: Mapping[str, str], open: Callable[[str], Generator], settings: Settings) -> None:
        """`open` opens a bundle, `paths` are those of the bundles by name; none is opened yet."""
        self.paths = dict(paths)
        self.loaded: dict[str, Model] = {}
        self.created = int(time.time())
        self._open, self._settings = open, settings
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def using(self, name: str | None) -> AsyncIterator[Model]:
        """A model, loaded if it is not, and kept as long as this context lasts; None is the first one.

        Raises RequestError for an unknown name, and SatchelError if the bundle cannot be opened.
        """
        model = await self._get(name)
        model.users += 1
        try:
            yield model
        finally:
            model.users -= 1
            model.used = time.monotonic()

    def load_first(self) -> None:
        """Load the first model at once. Raises SatchelError."""
        name = next(iter(self.paths))
        self.loaded[name] = self._load(name)

    def close(self, *, drain: bool = True) -> None:
        """End all models."""
        for model in self.loaded.values():
            model.close(drain=drain)
        self.loaded.clear()

    async def _get(self, name: str | None) -> Model:
        name = next(iter(self.paths)) if name is None else name
        if name not in self.paths:
            known = ", ".join(self.paths)
            raise RequestError(404, f"model {name[:60]}: is not served here: use {known}", "model", "model_not_found")
        async with self._lock:
            if name in self.loaded and not self.loaded[name].alive:
                await asyncio.to_thread(self._let_go, name)
            if name not in self.loaded:
                self.loaded[name] = await asyncio.to_thread(self._load, name)
            return self.loaded[name]

    def _load(self, name: str) -> Model:
        generator = self._open(self.paths[name])
        self._make_room(name, expected_bytes(generator, self._settings))
        return Model(name, generator, self._settings)

    def _make_room(self, name: str, needed: int) -> None:
        """Let models go that nobody uses, the least recently used first, until `needed` bytes are free."""
        limit = self._settings.memory_limit
        if limit is None:
            return
        if needed > limit:
            raise SatchelError(
                f"model {name}: needs about {needed // MIB} MiB, more than --memory-limit {limit // MIB}: raise it, or "
                "lower --max-context or --batch"
            )
        while sum(model.nbytes for model in self.loaded.values()) + needed > limit:
            idle = [model for model in self.loaded.values() if not model.users]
            if not idle:
                raise RequestError(503, f"model {name}: all memory is in use: ask again later", code="out_of_memory")
            name_of_oldest = min(idle, key=lambda model: model.used).name
            del idle
            self._let_go(name_of_oldest)

    def _let_go(self, name: str) -> None:
        """Close a model and free its memory: an engine is part of a cycle, which would keep its files mapped."""
        self.loaded.pop(name).close(drain=False)
        gc.collect()
        release_freed()


def expected_bytes(generator: Generator, settings: Settings) -> int:
    """About the bytes that a model takes: those of its files, and of keys and values: of full rows, or their limit."""
    bundle = generator.engine.bundle
    files = sum(record.bytes for record in bundle.manifest.files.values())
    if settings.kv_cache_mib is not None:
        return files + settings.kv_cache_mib * MIB
    return files + settings.rows * full_context_bytes(bundle, generator.max_context)
