"""Drafts of the next tokens from a smaller model with the same tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import PromptError
from satchel.runtime.execution.batch import PoolFullError
from satchel.runtime.execution.engine import Engine
from satchel.runtime.execution.state import State
from satchel.runtime.generation.draft_rows import DraftRows
from satchel.runtime.generation.prefill import copy_prefix
from satchel.runtime.generation.prefix_cache import PrefixCache
from satchel.runtime.generation.sampling.sampler import Sampler
from satchel.runtime.generation.tokenizer import Tokenizer
from satchel.runtime.ort.background import specialize_in_background
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.ort.providers import ProviderChoice
from satchel.runtime.util.defaults import PROVIDER

Ids = NDArray[np.int64]


class DraftModel:
    """A small model that is open; threads may share it."""

    def __init__(self, engine: Engine, prefix_cache: PrefixCache) -> None:
        self.engine = engine
        self.prefix_cache = prefix_cache

    @classmethod
    def open(
        cls,
        path: str | Path,
        target: Bundle,
        provider: str | ProviderChoice = PROVIDER,
        threads: int | None = None,
        *,
        cache_bytes: int = 0,
        verbose: bool = False,
        progress: bool = False,
        require_signature: str | Path | None = None,
        specialize: bool = False,
    ) -> DraftModel:
        """Open a bundle that drafts for another one, `target`. Arguments are those of `Generator.open`.

        Raises what that does, and PromptError for a bundle that cannot draft for this one.
        """
        bundle = open_bundle(path, progress=progress, require_signature=require_signature)
        manifest = bundle.manifest
        if manifest.states:
            raise PromptError(
                f"--draft {path}: has layers with convolution or recurrent states, which cannot go back to an earlier "
                "token: choose a model whose layers all attend"
            )
        if not share_vocabulary(bundle, target):
            raise PromptError(
                f"--draft {path}: has another vocabulary than the bundle: choose a model with the same tokenizer"
            )
        engine = Engine.open(bundle, provider, threads, verbose=verbose)
        if specialize and require_signature is None:
            specialize_in_background(bundle, provider, threads, shown=progress)
        return cls(engine, PrefixCache(bundle.kv_cache, cache_bytes, manifest.model.rotary_border))


def share_vocabulary(bundle: Bundle, other: Bundle) -> bool:
    """Whether the tokens of two bundles are the same, by their digests. Raises BundleError for a damaged tokenizer."""
    specs = [each.manifest.tokenizer for each in (bundle, other)]
    if None in specs:
        return specs == [None, None] and bundle.manifest.model.vocab_size == other.manifest.model.vocab_size
    files = [each.manifest.files[spec.file].sha256 for each, spec in zip((bundle, other), specs, strict=True) if spec]
    return files[0] == files[1] or Tokenizer.open(bundle).digest == Tokenizer.open(other).digest


class ModelDrafter:
    """Drafts for one sequence; the state of the small model follows that text as it really goes on.

    It is a state of its own, or a row of those that requests share.
    """

    def __init__(self, model: DraftModel, positions: int) -> None:
        """`positions` is the number of them that the text can take."""
        self._engine, self._prefix_cache = model.engine, model.prefix_cache
        self._capacity = min(positions, model.engine.max_context)
        self._rows: DraftRows | None = None
        self.row: int | None = None
        """Its row of those that are shared, if it has one."""
        self._state: State | None = None
        self._fed: list[int] = []

    def share(self, rows: DraftRows) -> None:
        """Take a row of these, from the first draft on."""
        self._rows = rows

    def room(self, text: Sequence[int]) -> int:
        """The number of tokens that can be drafted after a text."""
        return max(self._capacity - len(text) + 1, 0)

    def draft(self, text: Sequence[int], count: int, sampler: Sampler | None) -> list[int]:
        """Up to `count` tokens that may follow a text: the most likely, or what the sampler's next numbers draw."""
        count = min(count, self.room(text))
        missing = self.behind(text) if count > 0 else None
        state, found = self._state, list[int]()
        if missing is None or state is None or not self._has_memory(len(missing) + count):
            return found
        numbers = [] if sampler is None else sampler.coming(count)
        for span in self._engine.spans(len(missing)) if len(missing) > 1 else ():
            state.prefill(missing[span])
        if len(missing) == 1:
            state.decode(int(missing[0]))
        self.note(missing)
        while (token := self.chosen(sampler, numbers, len(found))) is not None:
            found.append(token)
            if len(found) == count:
                break
            state.decode(token)
            self._fed.append(token)
        return found

    def behind(self, text: Sequence[int]) -> Ids | None:
        """The tokens of a text that are to be fed, one or more; what was drafted and not taken is forgotten.

        None if the model has no such token (a vocabulary can have more rows than the tokenizer has tokens), or no row.
        """
        state = self._state
        if state is None:
            state = self._begin(text) if max(text) < self._engine.vocabulary else None
        if state is None:
            return None
        most = min(len(self._fed), len(text) - 1)  # the last token gives the logits
        start = max(most - LOOK_BACK, 0)
        common = next((at for at in range(start, most) if self._fed[at] != text[at]), most)
        missing = np.asarray(text[common:], np.int64)
        if missing.max() >= self._engine.vocabulary:
            return None
        state.cache.shorten(common)
        del self._fed[common:]
        return missing

    def note(self, tokens: Sequence[int] | Ids) -> None:
        """Remember what was fed."""
        self._fed += np.asarray(tokens, np.int64).tolist()

    def chosen(self, sampler: Sampler | None, numbers: Sequence[float], place: int) -> int | None:
        """The token that is drafted next, with the number at `place` if there are numbers; None without a state."""
        logits = None if self._state is None else self._state.logits
        if logits is None or not np.isfinite(logits.max()):
            return None
        if sampler is None or not numbers:
            return int(logits.argmax())
        return sampler.drawn(logits, numbers[place])

    @property
    def fresh(self) -> bool:
        """Whether nothing was fed yet, so that the first draft takes longer than others."""
        return self._state is None

    def close(self) -> None:
        """Put what was fed into the prefix cache, and free the state."""
        state, self._state = self._state, None
        if state is None:
            return
        self._prefix_cache.keep(np.asarray(self._fed, np.int64), state.cache)
        if self._rows is not None and self.row is not None:
            self._rows.free(self.row)
        else:
            self._engine.release(state.cache)
        self._fed, self.row = [], None

    def _begin(self, text: Sequence[int]) -> State | None:
        """A state with the longest prefix of a text that was kept; None if there is no room for it."""
        if self._rows is None:
            state = self._engine.new_state(self._capacity)
        else:
            self.row = self._rows.take()
            if self.row is None:
                return None
            state = self._rows.state(self.row)
        try:
            reused = copy_prefix(self._engine, state, np.asarray(text, np.int64), self._prefix_cache)
        except PoolFullError:
            state.cache.clear()
            reused = 0
        self._state, self._fed = state, list(text[:reused])
        return state

    def _has_memory(self, count: int) -> bool:
        return self._rows is None or self.row is None or self._rows.has_memory([(self.row, np.zeros(count, np.int64))])


LOOK_BACK = 64
"""Tokens at the end of what was fed that may differ from the text: as many as a draft has."""
