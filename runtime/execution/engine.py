"""The executor: runs the graphs of a bundle over explicit state. It knows token ids and logits, not text."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from satchel.runtime.bundle.manifest import Embeddings
from satchel.runtime.bundle.ranks import RankSpec
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, PromptError, ProviderError
from satchel.runtime.execution.adapters import Adapters
from satchel.runtime.execution.batch import Batch, pieces_agree, rows_agree
from satchel.runtime.execution.kv_cache import Cache
from satchel.runtime.execution.state import Ids, Logits, State
from satchel.runtime.ort.providers import PROVIDERS, ProviderChoice
from satchel.runtime.ort.session import SessionSettings
from satchel.runtime.util.defaults import PROVIDER

if TYPE_CHECKING:
    from satchel.runtime.execution.ranks.wire import Traffic
    from satchel.runtime.execution.ranks.world import World

TokenIds = Sequence[int] | NDArray[np.int64]


class Engine(ABC):
    """The graphs of one bundle, opened. Threads may share it, each with batches of its own.

    `prefill` and `decode` check what they are given and run `State.prefill` and `State.decode`.
    """

    stages = 1
    """How many groups of layers run at once, each for another step: so many runs may be under way."""

    def __init__(self, bundle: Bundle, settings: SessionSettings) -> None:
        self.bundle = bundle
        self.vocabulary = bundle.manifest.model.vocab_size
        self.max_context = bundle.manifest.model.max_context
        self._settings = settings
        self.adapters = Adapters(bundle)
        self._invariant: dict[str | None, bool] = {}
        self._piece_invariant: bool | None = None
        made = bundle.specialized
        self.runs_ahead: set[int] = set() if made is None else {run.drafted for run in made.runs_ahead}
        """So many drafted tokens in one run get the logits that each gets alone: they were compared."""
        self.wrong_ahead: set[int] = set()
        """So many do not."""
        self._invariant_lock = threading.Lock()

    @staticmethod
    def open(
        bundle: Bundle,
        provider: str | ProviderChoice = PROVIDER,
        threads: int | None = None,
        *,
        verbose: bool = False,
    ) -> Engine:
        """Open the graphs of prefill and decode.

        `provider` is the name of an execution provider, or a choice with options; `threads` None means one per physical
        core; `verbose` shows ONNX Runtime's own log. Raises BundleError and ProviderError.
        """
        choice = ProviderChoice(provider) if isinstance(provider, str) else provider
        return open_engine(bundle, SessionSettings(choice, threads, verbose))

    @property
    @abstractmethod
    def sessions(self) -> tuple[ort.InferenceSession, ...]:
        """Those that run prefill and decode."""

    @abstractmethod
    def sessions_for(self, count: int | None) -> tuple[ort.InferenceSession, ...]:
        """Those that a span of `count` tokens of a prompt runs, in order; None: those of decode."""

    @property
    def supports_batch(self) -> bool:
        """Whether the decode graph can run several sequences at once."""
        return False

    @property
    def batch_invariant(self) -> bool:
        """Whether rows decoded in one run get the logits that each gets alone; tried once, on first use."""
        return self.invariant_with(None)

    def invariant_with(self, adapter: str | None) -> bool:
        """As `batch_invariant`, for rows that all have this adapter."""
        with self._invariant_lock:
            if adapter not in self._invariant:
                self._invariant[adapter] = self.supports_batch and rows_agree(self, adapter)
            return self._invariant[adapter]

    def why_not_ahead(self, adapter: str | None) -> str | None:
        """Why `State.decode_ahead` is more than one run of the graph; None if one run is worth trying."""
        return "only the provider cpu takes several tokens of a sequence in a run"

    @property
    def piece_invariant(self) -> bool:
        """Whether a prompt fed in small pieces gets the same logits as in larger ones; tried once, on first use."""
        with self._invariant_lock:
            if self._piece_invariant is None:
                self._piece_invariant = pieces_agree(self)
            return self._piece_invariant

    def new_batch(self, rows: int, capacity: int, *, force: bool = False) -> Batch:
        """An empty batch of `rows` sequences of up to `capacity` positions each.

        All rows are decoded in one run if that changes none of them (`batch_invariant`), else one after another.
        `force` always decodes them in one run, which is faster. Raises PromptError if the bundle does not allow that,
        or so large a capacity, or if there is not enough memory.
        """
        if rows < 1:
            raise PromptError(f"--batch {rows}: must be 1 or more")
        if force and not self.supports_batch:
            raise PromptError("the decode graph of this bundle takes a fixed number of rows: they cannot run together")
        self.check_capacity(capacity)
        batch, border = self._new_batch(rows, capacity, force), self.bundle.manifest.model.rotary_border
        if border is not None:
            for state in batch.states:
                state.watch(border, self.spans)
        return batch

    def new_pool(self, rows: int, capacity: int, kept: int, limit: int | None = None, *, force: bool = False) -> Batch:
        """As `new_batch`, of rows that share memory where the graphs allow that: in blocks, each taken when needed.

        `kept` are bytes for sequences that are kept when they have ended, `limit` those for all, None for as many as
        `rows` and `kept` need. Raises PromptError as `new_batch`, and for a limit that holds no block or that these
        graphs do not keep.
        """
        if limit is not None:
            manifest = self.bundle.manifest
            fixed = manifest.states or manifest.model.rotary_border or not any(v.ragged for v in manifest.variants)
            advice = "" if fixed else "specialize it for satchel's kernels, or "
            raise PromptError(
                f"--kv-cache-mib {limit >> 20}: the rows of this bundle have fixed memory: {advice}lower --batch or "
                "--max-context instead"
            )
        return self.new_batch(rows, capacity, force=force)

    def new_state(self, capacity: int, adapter: str | None = None) -> State:
        """A sequence of up to `capacity` positions, a batch of one row. Raises PromptError as `new_batch` and `add`."""
        return self.new_batch(1, capacity).add(adapter)

    @abstractmethod
    def release(self, cache: Cache) -> None:
        """Take back the memory of a cache that is no longer used, for the next one."""

    @abstractmethod
    def spans(self, count: int, chunk: int | None = None) -> Iterator[slice]:
        """Spans that cover `count` tokens of a prompt, each for one `State.prefill`: of up to `chunk` tokens.

        `chunk` None takes what suits the graphs.
        """

    def prefill(self, state: State, ids: TokenIds, chunk: int | None = None) -> Logits:
        """Feed `ids` after what the state already holds, in spans of up to `chunk` tokens.

        Returns the logits of the last id, [vocabulary] float32: a buffer of the state that its next step overwrites.
        Raises PromptError if there is no id, one is outside the vocabulary, or they do not fit.
        """
        tokens = self.check_ids(ids)
        _check_chunk(chunk)
        state.cache.require(len(tokens))
        state.expect(state.cache.length + len(tokens))
        for span in self.spans(len(tokens), chunk):
            state.prefill(tokens[span])
        return state.logits

    def decode(self, state: State, token: int) -> Logits:
        """Feed one token. Returns its logits, [vocabulary] float32: the same buffer as `prefill` returns.

        Raises PromptError if the token is outside the vocabulary or the context is full.
        """
        if not 0 <= token < self.vocabulary:
            raise self._outside(token)
        state.decode(token)
        return state.logits

    @property
    def scored_by(self) -> str | None:
        """The variant whose prefill kernels `score` runs; None for the portable score graph."""
        return None

    def score(self, ids: TokenIds, chunk: int | None = None, adapter: str | None = None) -> Logits:
        """The logits of every position of `ids`, [sequence, vocabulary] float32.

        They come from the score graph, or by the kernels of prefill (`scored_by`); the graph is opened on first use.
        Raises PromptError as `prefill` does.
        """
        tokens = self.check_ids(ids)
        _check_chunk(chunk)
        self.adapters.check(adapter)
        self.check_capacity(len(tokens))
        logits: Logits = np.empty((len(tokens), self.vocabulary), np.float32)
        self._run_score(tokens, chunk, logits, adapter)
        return logits

    def embed(self, ids: TokenIds, chunk: int | None = None, adapter: str | None = None) -> Logits:
        """One vector of a text, [hidden] float32: its hidden states, pooled as the manifest says, not normalized.

        The graph of hidden states is opened on first use. Raises PromptError as `prefill` does, BundleError for a
        bundle that was exported without `--embeddings`.
        """
        embeddings = self.check_embeddings()
        tokens = self.check_ids(ids)
        _check_chunk(chunk)
        self.adapters.check(adapter)
        self.check_capacity(len(tokens))
        total: NDArray[np.float64] = np.zeros(embeddings.size)
        for states in self._run_hidden(tokens, chunk, adapter):
            total = states[-1] if embeddings.pooling == "last" else total + states.sum(axis=0, dtype=np.float64)
        return (total if embeddings.pooling == "last" else total / len(tokens)).astype(np.float32)

    def check_embeddings(self) -> Embeddings:
        """How texts become vectors. Raises BundleError for a bundle that was exported without `--embeddings`."""
        embeddings = self.bundle.manifest.embeddings
        if embeddings is None:
            raise BundleError(f"{self.bundle.folder}: has no embeddings: export it with --embeddings mean or last")
        return embeddings

    def end_profiling(self) -> dict[ort.InferenceSession, Path]:
        """Write the profiles that `SessionSettings.profile` asked for, and record no more; the file of each session."""
        return {session: Path(session.end_profiling()) for session in dict.fromkeys(self.sessions)}

    def check_ids(self, ids: TokenIds) -> Ids:
        """The ids as contiguous int64.

        Raises PromptError if there is none, they are not a flat list of integers, or one is outside the vocabulary.
        """
        tokens = np.asarray(ids)
        if not tokens.size:
            raise PromptError("the prompt has no tokens: give at least one token to continue from")
        if tokens.ndim != 1 or (tokens.dtype.kind not in "iu" and not all(type(token) is int for token in ids)):
            raise PromptError("token ids must be a flat list of integers")
        outside = [int(token) for token in tokens if not 0 <= token < self.vocabulary]
        if outside:
            raise self._outside(outside[0])
        return np.ascontiguousarray(tokens, np.int64)

    def check_capacity(self, capacity: int) -> None:
        """Raise PromptError if the bundle does not allow a context of `capacity` positions."""
        if not 1 <= capacity <= self.max_context:
            raise PromptError(
                f"a context of {capacity} positions is not possible: this bundle allows 1 to {self.max_context}: "
                "ask for fewer tokens"
            )

    def _outside(self, token: int) -> PromptError:
        return PromptError(f"token id {token} is outside the vocabulary: use ids from 0 to {self.vocabulary - 1}")

    @abstractmethod
    def _new_batch(self, rows: int, capacity: int, force: bool) -> Batch:
        """As `new_batch`, of arguments that were checked."""

    @abstractmethod
    def _run_score(self, tokens: Ids, chunk: int | None, logits: Logits, adapter: str | None) -> None:
        """Write the logits of all tokens, [tokens, vocabulary], by the score graph."""

    def _run_hidden(self, tokens: Ids, chunk: int | None, adapter: str | None) -> Iterator[Logits]:
        """The hidden states of each span of tokens, [tokens of the span, hidden]; a buffer for the next ones."""
        raise BundleError(f"{self.bundle.folder}: embeddings run with the provider cpu only")


def open_engine(bundle: Bundle, settings: SessionSettings) -> Engine:
    """Open the graphs of prefill and decode with what suits the bundle and the provider.

    Raises BundleError and ProviderError.
    """
    settings.provider.check()
    spec = bundle.manifest.rank
    world = None if spec is None or settings.alone else _world_of(bundle, spec)
    if bundle.manifest.static is None and not PROVIDERS[settings.provider.name].device_memory:
        from satchel.runtime.execution.cpu import CpuEngine

        return CpuEngine(bundle, settings) if world is None else _open_lead(bundle, settings, world)
    if bundle.manifest.states:
        raise ProviderError(
            f"this bundle has layers with convolution or recurrent states, which provider '{settings.provider.name}' "
            "does not run: use the provider cpu"
        )
    from satchel.runtime.execution.experimental.executor import open_experimental

    return open_experimental(bundle, settings)


def join_ranks(path: Path) -> World:
    """Find the other ranks of a run of bundles that `satchel shard` has written to `path`. Raises SatchelError."""
    from satchel.runtime.execution.ranks.world import join

    world = join(path)
    _worlds[world.folder.resolve()] = world
    return world


def follow_rank(world: World, bundle: Bundle, settings: SessionSettings) -> None:
    """Run the part of a model that this rank has until the first one ends the run. Raises as `open_engine`."""
    from satchel.runtime.execution.ranks.follow import Follower

    Follower(bundle, settings).run(world)


def rank_traffic() -> Traffic:
    """What this rank has exchanged with others since the last call."""
    from satchel.runtime.execution.ranks.wire import traffic

    return traffic()


_worlds: dict[Path, World] = {}
"""The runs of several ranks that this process is part of, by the folder of its bundle."""


def _world_of(bundle: Bundle, spec: RankSpec) -> World:
    world = _worlds.get(bundle.folder.resolve())
    if world is None:
        raise BundleError(
            f"{bundle.folder}: is one of {spec.ranks} ranks' parts of a model: give the folder that holds all, and "
            f"start it with mpiexec -n {spec.ranks} satchel run {bundle.folder.parent}"
        )
    return world


def _open_lead(bundle: Bundle, settings: SessionSettings, world: World) -> Engine:
    from satchel.runtime.execution.ranks.lead import LeadEngine

    return LeadEngine(bundle, settings, world)


def _check_chunk(chunk: int | None) -> None:
    if chunk is not None and chunk < 1:
        raise PromptError(f"a chunk of {chunk} tokens is not possible: give at least 1")
