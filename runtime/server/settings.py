"""What the server was started with."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """Limits and permissions.

    Attributes:
        rows: Requests that run at a time, per model.
        queue: Requests that wait, per model; another one is refused.
        max_body: Maximum size of a body in bytes.
        timeout: Maximum seconds for a request, time in the queue included; None for no limit.
        api_key: The key that requests must have; None for none.
        cors_origins: Origins, such as http://localhost:3000, whose pages may ask.
        kv_cache_mib: Memory of the keys and values of a model in MiB; None for room for all rows.
        memory_limit: Bytes that all loaded models may take; None for no limit.
        log_prompts: Whether the log has the texts of prompts.
        quiet: Whether there is no log of requests.
    """

    rows: int = 8
    queue: int = 64
    max_body: int = 16 * MIB
    timeout: float | None = None
    api_key: str | None = None
    cors_origins: tuple[str, ...] = ()
    kv_cache_mib: int | None = None
    memory_limit: int | None = None
    log_prompts: bool = False
    quiet: bool = False
