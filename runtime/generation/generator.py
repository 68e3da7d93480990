"""A bundle ready to generate: the way in for programs and commands."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import PromptError, SatchelError
from satchel.runtime.execution.engine import Engine, TokenIds
from satchel.runtime.generation.batch import run_batch, run_samples
from satchel.runtime.generation.beam_results import adjustment, beam_results
from satchel.runtime.generation.beam_search import BeamSearch
from satchel.runtime.generation.beam_settings import BeamSettings, EarlyStopping, check_beams
from satchel.runtime.generation.detokenizer import IncrementalDetokenizer
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.prefill import Progress
from satchel.runtime.generation.prefix_cache import Prefix, PrefixCache
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.sampling.logprobs import TokenLogprob, prompt_log_probabilities
from satchel.runtime.generation.sampling.sampler import Sampler
from satchel.runtime.generation.sequence import ActiveSequence, Callback, Choose
from satchel.runtime.generation.session_file import SavedState, check_room, read_state, write_state
from satchel.runtime.generation.stream import TokenStream
from satchel.runtime.generation.templates.chat_template import ChatTemplate
from satchel.runtime.generation.tokenizer import Tokenizer
from satchel.runtime.ort.custom_ops import DEFAULT_CUSTOM, Custom
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.ort.providers import ProviderChoice
from satchel.runtime.util.defaults import BATCH_ROWS, PREFIX_MIB, PROVIDER
from satchel.runtime.util.progress import waiting

MIB = 1 << 20

Prompt = str | TokenIds


@dataclass(frozen=True)
class Request:
    """A prompt, text or token ids, and how to continue it."""

    prompt: Prompt
    options: GenerationOptions = field(default_factory=GenerationOptions)


class Generator:
    """A bundle ready to generate. Threads may share one: each generation has a state of its own.

    Its options are the fields of `GenerationOptions`, given by name: `generate("Once", max_new_tokens=40,
    temperature=0.8, stop="\\n")`. Without any, the most likely token is taken each time.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer | None, max_context: int, store: PrefixCache) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.store = store
        self._template: ChatTemplate | None = None
        self._template_lock = threading.Lock()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        provider: str | ProviderChoice = PROVIDER,
        threads: int | None = None,
        max_context: int | None = None,
        prefix_mib: int = PREFIX_MIB,
        verbose: bool = False,
        progress: bool = False,
        custom: Custom = DEFAULT_CUSTOM,
        require_signature: str | Path | None = None,
    ) -> Generator:
        """Open a bundle, a folder or a packed file.

        `provider` is the name of an execution provider, or a choice with options. `threads` None means one per physical
        core; `max_context` (positions) None means the bundle's own and may only lower it; `prefix_mib` (MiB) is how
        much memory keys and values of what was seen may take, for prompts that begin alike; `verbose` shows ONNX
        Runtime's log, `progress` what goes on while a large bundle is first checked, and while it is opened, on a
        terminal's standard error; `require_signature` is the file of a public key with whose private key the bundle
        must be signed; `custom` says what of a user's own is to run: passes, and libraries of operators.
        Raises BundleError, ProviderError, and PromptError for a `max_context` that the bundle does not allow.
        """
        bundle = open_bundle(path, progress=progress, require_signature=require_signature, custom=custom)
        limit = bundle.manifest.model.max_context
        if max_context is not None and not 1 <= max_context <= limit:
            raise PromptError(f"--max-context {max_context}: this bundle allows 1 to {limit}")
        if prefix_mib < 0:
            raise PromptError(f"--prefix-memory {prefix_mib}: must be 0 or more")
        with waiting("opening the bundle", shown=progress):
            engine = Engine.open(bundle, provider, threads, verbose=verbose)
            tokenizer = Tokenizer.open(bundle) if bundle.manifest.tokenizer else None
        store = PrefixCache(bundle.manifest.kv_cache, prefix_mib * MIB)
        return cls(engine, tokenizer, max_context or limit, store)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        choose: Choose | None = None,
        callback: Callback | None = None,
        **options: Any,
    ) -> Generation:
        """Continue a prompt (text or token ids) and return the whole. Takes and raises what `stream` does."""
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        with self.stream(prompt, choose=choose, callback=callback, **options) as stream:
            return stream.result()

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        choose: Choose | None = None,
        callback: Callback | None = None,
        progress: Progress = lambda count: None,
        **options: Any,
    ) -> TokenStream:
        """Continue a prompt (text or token ids) piece by piece. The pieces joined are the text of `generate`.

        Args:
            choose: Picks a token from logits [vocabulary], in place of the sampling options.
            callback: Gets each piece of text; a true value from it ends the generation.
            progress: Hears how many tokens of the prompt have been fed since it was last called.
            options: Fields of `GenerationOptions`.

        Raises:
            PromptError: The request does not fit the bundle; here, before anything runs.
            TypeError: There is no such option.
        """
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        continuation = self.continuation(Request(prompt, GenerationOptions(**options)), choose, callback)
        return TokenStream(self.engine, continuation, self.store, progress)

    def samples(self, prompt: Prompt, count: int, **options: Any) -> list[Generation]:
        """Continue one prompt `count` times over, from one prefill. Options are as for `stream`.

        The first is what `generate` gives with the same seed. Raises PromptError.
        """
        if count < 1:
            raise PromptError(f"--samples {count}: must be 1 or more")
        request = Request(prompt, GenerationOptions(**options))
        if count > 1 and request.options.greedy:
            raise PromptError(f"--samples {count}: greedy samples are all the same: give a --temperature above 0")
        first = self._sampler(request.options, self.encode(prompt))
        group = [self.continuation(request, first.fork(row)) for row in range(count)]
        rows = self.engine.new_batch(count, group[0].positions)
        if group[0].limit:
            for continuation in run_samples(self.engine, rows, group, self.store):
                if continuation.error:
                    raise continuation.error
        return [Generation.of(continuation, rows.nbytes // count) for continuation in group]

    def generate_batch(
        self, prompts: Sequence[Prompt], *, rows: int = BATCH_ROWS, together: bool | None = None, **options: Any
    ) -> list[Generation]:
        """Continue several prompts, up to `rows` of them at a time, each as `generate` would. Raises PromptError.

        `together` True decodes all rows in one run: faster, and the texts may differ from those of `generate`.
        """
        found: list[Generation | None] = [None] * len(prompts)
        requests = [Request(prompt, GenerationOptions(**options)) for prompt in prompts]
        for index, outcome in self.run_requests(requests, rows=rows, together=together):
            if isinstance(outcome, SatchelError):
                raise outcome
            found[index] = outcome
        return [generation for generation in found if generation is not None]

    def run_requests(
        self, requests: Sequence[Request], *, rows: int = BATCH_ROWS, together: bool | None = None
    ) -> Iterator[tuple[int, Generation | SatchelError]]:
        """Run requests, up to `rows` of them at a time, and give each one's index and outcome as it ends.

        A request that is wrong gives its error; the others run. `together` is as for `generate_batch`. Raises
        PromptError for wrong `rows`, and where rows cannot run together.
        """
        continuations: list[ActiveSequence] = []
        indices: dict[int, int] = {}
        for index, request in enumerate(requests):
            try:
                continuation = self.continuation(request)
            except SatchelError as error:
                yield index, error
                continue
            indices[id(continuation)] = index
            continuations.append(continuation)
        if not continuations:
            return
        capacity = max(continuation.positions for continuation in continuations)
        table = self.engine.new_batch(min(rows, len(continuations)), capacity, force=bool(together))
        for continuation in run_batch(self.engine, table, continuations, self.store):
            kv_bytes = table.nbytes // len(table.states)
            yield indices[id(continuation)], continuation.error or Generation.of(continuation, kv_bytes)

    def beam_search(
        self,
        prompt: Prompt,
        beams: int,
        *,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        **options: Any,
    ) -> list[Generation]:
        """The likeliest continuations that `beams` beams find, best first, with their scores: see `BeamSettings`.

        Of the options of `stream` those that draw, `stop` and `logprobs` are not to be had. Raises PromptError.
        """
        request = Request(prompt, GenerationOptions(**options))
        check_beams(request.options, beams, length_penalty, early_stopping)
        checked = self.continuation(request)
        ids, ends = checked.prompt, self._end_tokens(request.options)
        settings = BeamSettings(beams, checked.limit, ends, length_penalty, early_stopping, request.options.time_limit)
        adjust = adjustment(request.options, len(ids), ends, self.engine.vocabulary)
        return beam_results(BeamSearch(self.engine, ids, settings, self.store, adjust), self.tokenizer)

    def prompt_logprobs(self, prompt: Prompt, top_n: int = 0) -> list[TokenLogprob | None]:
        """The log-probability of each token of a prompt given those before it, and of the `top_n` most likely ones.

        Through the score graph. The first token has none. Raises PromptError.
        """
        ids = self.encode(prompt)
        self._check_length(ids)
        return prompt_log_probabilities(self.engine.score(ids), ids, top_n)

    def save_state(
        self,
        path: str | Path,
        prompt: Prompt,
        *,
        messages: Sequence[dict[str, Any]] = (),
        details: Mapping[str, Any] | None = None,
        option: str = "--save-state",
        progress: bool = False,
    ) -> int:
        """Save the keys and values that are kept for the longest beginning of a prompt; returns its tokens' number.

        Usually the prompt is that of an earlier generation and its answer. `messages` and `details`, JSON values, are
        saved with it. `option` names the path in messages; `progress` shows a bar when it takes more than two seconds.
        Raises PromptError when nothing is kept, SatchelError when the file cannot be written.
        """
        ids = self.encode(prompt)
        count, cache = self.store.longest(ids)
        if cache is None:
            raise PromptError("nothing of this is kept: generate first, or raise --prefix-memory")
        state = SavedState(Prefix(ids[:count], cache), tuple(messages), dict(details or {}))
        write_state(path, self.engine.bundle.fingerprint, state, option, progress=progress)
        return count

    def load_state(
        self, path: str | Path, *, check: Callable[[SavedState], object] = lambda state: None, progress: bool = False
    ) -> SavedState:
        """Read a state and keep it: prompts that begin with `state.prefix.ids` prefill only the rest.

        `check` may raise before it is kept in place of others. Raises what `read_state` does, and PromptError for a
        state that `max_context` or the store is too small for.
        """
        room = partial(check_room, path, self.engine.bundle.manifest, self.max_context, self.store.most)
        state = read_state(path, self.engine.bundle, room, progress=progress)
        check(state)
        self.store.put(state.prefix)
        return state

    def encode(self, prompt: Prompt) -> NDArray[np.int64]:
        """The token ids of a prompt, text or ids, checked. Raises PromptError."""
        if not isinstance(prompt, str):
            return self.engine.check_ids(prompt)
        ids = self.need_tokenizer().encode(prompt)
        if not ids:
            raise PromptError("the prompt is empty: give some text to continue")
        return self.engine.check_ids(ids)

    @property
    def template(self) -> ChatTemplate:
        """The chat template: the bundle's own, unless another was set. Raises BundleError for a bundle without one."""
        with self._template_lock:
            if self._template is None:
                self._template = ChatTemplate.open(self.engine.bundle, self.need_tokenizer())
            return self._template

    @template.setter
    def template(self, template: ChatTemplate) -> None:
        self._template = template

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises PromptError for a bundle without one."""
        if self.tokenizer is None:
            raise PromptError("this bundle has no tokenizer: give the prompt as token ids from Python")
        return self.tokenizer

    def continuation(
        self, request: Request, choose: Choose | Sampler | None = None, callback: Callback | None = None
    ) -> ActiveSequence:
        """A request checked and ready to run. Raises PromptError."""
        ids, options = self.encode(request.prompt), request.options
        options.check_all(self.engine.vocabulary)
        if options.stop:
            self.need_tokenizer()
        self._check_length(ids)
        limit = min(options.max_new_tokens, self.max_context - len(ids) + 1)
        text = IncrementalDetokenizer(self.tokenizer, ids.tolist()) if self.tokenizer else None
        chosen = self._sampler(options, ids) if choose is None else choose
        return ActiveSequence(ids, options, limit, chosen, self._end_tokens(options), text, callback)

    def _sampler(self, options: GenerationOptions, ids: NDArray[np.int64]) -> Sampler:
        return Sampler(options, self._end_tokens(options), self.engine.vocabulary, ids)

    def _end_tokens(self, options: GenerationOptions) -> frozenset[int]:
        """The model's end tokens, and special tokens that the user wants to stop at: those have no text."""
        ends = set(self.engine.bundle.manifest.model.eos_token_ids)
        if self.tokenizer:
            ends |= {token for text in options.stop if (token := self.tokenizer.special_token(text)) is not None}
        return frozenset(ends)

    def _check_length(self, ids: NDArray[np.int64]) -> None:
        if len(ids) > self.max_context:
            raise PromptError(
                f"the prompt has {len(ids)} tokens but the context holds {self.max_context}: shorten the prompt "
                f"or raise --max-context (this bundle allows up to {self.engine.max_context})"
            )
