"""High-level generation API: a bundle that is open and ready to generate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from satchel.runtime.errors import PromptError, SatchelError
from satchel.runtime.execution.engine import Engine
from satchel.runtime.generation.beam_results import BeamConstraints, adjustment, beam_results
from satchel.runtime.generation.beam_search import BeamSearch
from satchel.runtime.generation.beam_settings import BeamSettings, EarlyStopping, check_beams
from satchel.runtime.generation.constraint import Constraint, Grammars
from satchel.runtime.generation.detokenizer import IncrementalDetokenizer
from satchel.runtime.generation.draft_model import DraftModel
from satchel.runtime.generation.grammar import Grammar
from satchel.runtime.generation.options import GenerationOptions
from satchel.runtime.generation.prefill import Progress
from satchel.runtime.generation.prefix_cache import Prefix, PrefixCache, full_context_bytes
from satchel.runtime.generation.prompts import Prompts
from satchel.runtime.generation.request import Prompt, Request
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.sampling.logprobs import TokenLogprob, prompt_log_probabilities
from satchel.runtime.generation.sampling.sampler import Sampler
from satchel.runtime.generation.scheduler import Scheduler
from satchel.runtime.generation.sequence import ActiveSequence, Callback, Choose
from satchel.runtime.generation.session_file import SavedState, check_adapter, check_size, read_state, write_state
from satchel.runtime.generation.snapshots import snapshots_of
from satchel.runtime.generation.speculation import Speculation, check_mode, warn_without_effect
from satchel.runtime.generation.stream import TokenStream
from satchel.runtime.generation.tokenizer import Tokenizer
from satchel.runtime.ort.background import specialize_in_background
from satchel.runtime.ort.custom_ops import DEFAULT_CUSTOM, Custom
from satchel.runtime.ort.open_bundle import open_bundle
from satchel.runtime.ort.providers import ProviderChoice
from satchel.runtime.util.defaults import BATCH_ROWS, PREFIX_CACHE_MIB, PROVIDER, SPECULATE
from satchel.runtime.util.progress import waiting

MIB = 1 << 20


class Generator(Prompts):
    """An open bundle. Threads may share one: each generation has its own state.

    Options are the fields of `GenerationOptions`, given by name: `generate("Once", max_new_tokens=40, temperature=0.8,
    stop="\\n")`. Without any, decoding is greedy. A prompt is fed as it is; `encode_chat` puts a question into the
    bundle's chat template, and `Conversation` keeps several turns.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer | None,
        max_context: int,
        prefix_cache: PrefixCache,
        *,
        speculate: str = SPECULATE,
        draft: DraftModel | None = None,
    ) -> None:
        super().__init__(engine, tokenizer, max_context)
        self.prefix_cache = prefix_cache
        self.speculation = None if speculate == "off" else Speculation(engine, draft)
        self._grammars = Grammars(tokenizer, engine.vocabulary, engine.bundle.manifest.model.eos_token_ids)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        provider: str | ProviderChoice = PROVIDER,
        threads: int | None = None,
        max_context: int | None = None,
        prefix_cache_mib: int | None = PREFIX_CACHE_MIB,
        verbose: bool = False,
        progress: bool = False,
        custom: Custom = DEFAULT_CUSTOM,
        require_signature: str | Path | None = None,
        specialize: bool = True,
        speculate: str = SPECULATE,
        draft: str | Path | None = None,
    ) -> Generator:
        """Open a bundle: a folder or a packed file.

        Args:
            path: The bundle.
            provider: Name of an execution provider, or a choice with options.
            threads: CPU threads; None means one per physical core.
            max_context: Maximum positions of prompt and new text; None means the bundle's limit, which it may lower.
            prefix_cache_mib: Size of the prefix cache in MiB; None means that of one full context.
            verbose: Show ONNX Runtime's log.
            progress: Show on a terminal's standard error what takes long.
            custom: Which of the user's own passes and operator libraries may run.
            require_signature: File of a public key; the bundle must be signed with its private key.
            specialize: Optimize the bundle for this machine in the background, so that it opens and runs faster the
                next time; SATCHEL_SPECIALIZE=off switches that off for all programs.
            speculate: Where drafts of the next tokens come from: "auto" (earlier text, and `draft` if given), "ngram"
                (earlier text) or "off" (no drafts). The text is the same.
            draft: A bundle of a smaller model with the same tokenizer, which drafts the next tokens.

        Raises:
            BundleError: The bundle cannot be used.
            ProviderError: The provider is not available.
            PromptError: `max_context` or `prefix_cache_mib` is out of range, or `draft` has another tokenizer.
        """
        check_mode(speculate, draft)
        bundle = open_bundle(path, progress=progress, require_signature=require_signature, custom=custom)
        limit = bundle.manifest.model.max_context
        if max_context is not None and not 1 <= max_context <= limit:
            raise PromptError(f"--max-context {max_context}: this bundle allows 1 to {limit}")
        if prefix_cache_mib is not None and prefix_cache_mib < 0:
            raise PromptError(f"--prefix-cache-mib {prefix_cache_mib}: must be 0 or more")
        with waiting("opening the bundle", shown=progress):
            engine = Engine.open(bundle, provider, threads, verbose=verbose)
            tokenizer = Tokenizer.open(bundle) if bundle.manifest.tokenizer else None
        if specialize and require_signature is None:
            specialize_in_background(bundle, provider, threads, shown=progress)
        context, manifest = max_context or limit, bundle.manifest
        size = full_context_bytes(bundle, context) if prefix_cache_mib is None else prefix_cache_mib * MIB
        prefix_cache = PrefixCache(bundle.kv_cache, size, manifest.model.rotary_border, manifest.states)
        model = None
        if draft is not None:
            model = DraftModel.open(
                draft, bundle, provider, threads, cache_bytes=size, verbose=verbose, progress=progress,
                require_signature=require_signature, specialize=specialize,
            )  # fmt: skip
        warn_without_effect(engine, speculate, draft)
        return cls(engine, tokenizer, context, prefix_cache, speculate=speculate, draft=model)

    def generate(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        choose: Choose | None = None,
        callback: Callback | None = None,
        **options: Any,
    ) -> Generation:
        """Continue a prompt (text or token ids) and return the result. Arguments and errors are those of `stream`."""
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
            prompt: Text, encoded as it is, or token ids.
            max_new_tokens: As in `GenerationOptions`.
            choose: Picks a token from logits [vocabulary], in place of the sampling options.
            callback: Gets each piece of text; a true value from it ends generation.
            progress: Called with the number of prompt tokens that were fed since its last call.
            options: Fields of `GenerationOptions`.

        Raises:
            PromptError: The request does not fit the bundle; raised before anything runs.
            TypeError: There is no such option.
        """
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        sequence = self.new_sequence(Request(prompt, GenerationOptions(**options)), choose, callback)
        return TokenStream(self.engine, sequence, self.prefix_cache, progress)

    def samples(self, prompt: Prompt, count: int, **options: Any) -> list[Generation]:
        """Sample `count` continuations of one prompt from one prefill. Options are those of `stream`.

        The first equals that of `generate` with the same seed. Raises PromptError.
        """
        if count < 1:
            raise PromptError(f"--num-return-sequences {count}: must be 1 or more")
        request = Request(prompt, GenerationOptions(**options))
        if count > 1 and request.options.greedy:
            raise PromptError(
                f"--num-return-sequences {count}: greedy samples are all the same: set --temperature above 0"
            )
        return self._run_all([replace(request, sample=sample) for sample in range(count)], rows=count)

    def generate_batch(
        self, prompts: Sequence[Prompt], *, rows: int = BATCH_ROWS, force_batch: bool = False, **options: Any
    ) -> list[Generation]:
        """Continue several prompts, up to `rows` at a time, each as `generate` would. Raises PromptError.

        `force_batch` decodes rows in one batch even where that changes results; it may be faster.
        """
        requests = [Request(prompt, GenerationOptions(**options)) for prompt in prompts]
        return self._run_all(requests, rows=rows, force_batch=force_batch)

    def run_requests(
        self,
        requests: Sequence[Request],
        *,
        rows: int = BATCH_ROWS,
        force_batch: bool = False,
        kv_cache_mib: int | None = None,
    ) -> Iterator[tuple[int, Generation | SatchelError]]:
        """Run requests, up to `rows` at a time; yields the index and the result of each as it ends.

        A request that is wrong yields its error; the others run. `force_batch` is as for `generate_batch`,
        `kv_cache_mib` as for `Scheduler`. Raises PromptError for wrong `rows`, for `force_batch` where the graph cannot
        decode a batch, and for a limit that cannot be kept.
        """
        sequences: dict[int, ActiveSequence] = {}
        for index, request in enumerate(requests):
            try:
                sequences[index] = self.new_sequence(request)
            except SatchelError as error:
                yield index, error
        if not sequences:
            return
        capacity = max(sequence.positions for sequence in sequences.values())
        scheduler = self.scheduler(
            rows=min(rows, len(sequences)),
            capacity=capacity,
            stretch=math.inf,
            force_batch=force_batch,
            kv_cache_mib=kv_cache_mib,
        )
        indices = {scheduler.enqueue(sequence, requests[index]): index for index, sequence in sequences.items()}
        for event in scheduler.run():
            if isinstance(event.outcome, (Generation, SatchelError)):
                yield indices[event.id], event.outcome
            elif event.outcome is not None:
                raise event.outcome

    def scheduler(
        self, *, rows: int = BATCH_ROWS, capacity: int | None = None, kv_cache_mib: int | None = None, **options: Any
    ) -> Scheduler:
        """A scheduler for requests that come and go. Arguments and errors are those of `Scheduler`.

        `capacity` None gives each row the largest context.
        """
        size: dict[str, Any] = {"rows": rows, "capacity": capacity or self.max_context, "kv_cache_mib": kv_cache_mib}
        drafts = None if self.speculation is None else self.speculation.draft_rows(**size)
        return Scheduler(self.engine, self.prefix_cache, self.new_sequence, draft_rows=drafts, **size, **options)

    def beam_search(
        self,
        prompt: Prompt,
        beams: int,
        *,
        length_penalty: float = 1.0,
        early_stopping: EarlyStopping = False,
        **options: Any,
    ) -> list[Generation]:
        """The most likely continuations that a search with `beams` beams finds, best first, with scores.

        `BeamSettings` describes the search. The options of `stream` that sample, `stop`, `max_repeats` and `logprobs`
        are not available. A grammar rules tokens out, and changes no score of others. Raises PromptError.
        """
        request = Request(prompt, GenerationOptions(**options))
        check_beams(request.options, beams, length_penalty, early_stopping)
        checked = self.new_sequence(request)
        ids, ends = checked.prompt, self._end_tokens(request.options)
        settings = BeamSettings(
            beams, checked.limit, ends, length_penalty, early_stopping, request.options.time_limit,
            request.options.adapter,
        )  # fmt: skip
        adjust = adjustment(request.options, len(ids), ends, self.engine.vocabulary, checked.limit)
        if isinstance(checked.constraint, Constraint):
            adjust = BeamConstraints(checked.constraint, len(ids), adjust)
        search = BeamSearch(self.engine, ids, settings, self.prefix_cache, adjust, snapshots=checked.snapshots)
        return beam_results(search, self.tokenizer)

    def embed(
        self, texts: Sequence[Prompt], *, normalize: bool = True, adapter: str | None = None
    ) -> NDArray[np.float32]:
        """A vector for each text (or its token ids), [texts, hidden] float32, by a bundle exported with `--embeddings`.

        `normalize` scales each to length 1, so that their products are cosines. Each text is what it is alone, of any
        length up to `max_context`. Raises PromptError, and BundleError for a bundle without that graph.
        """
        found = np.empty((len(texts), self.engine.check_embeddings().size), np.float32)
        for index, text in enumerate(texts):
            ids = self.encode(text)
            self._check_length(ids)
            vector = self.engine.embed(ids, adapter=adapter)
            found[index] = vector / max(float(np.linalg.norm(vector)), 1e-12) if normalize else vector
        return found

    def prompt_logprobs(self, prompt: Prompt, top_n: int = 0, adapter: str | None = None) -> list[TokenLogprob | None]:
        """The log-probability of each prompt token given those before it, and of the `top_n` most likely ones.

        By `Engine.score`. The first token has none. Raises PromptError.
        """
        ids = self.encode(prompt)
        self._check_length(ids)
        return prompt_log_probabilities(self.engine.score(ids, adapter=adapter), ids, top_n)

    def save_state(
        self,
        path: str | Path,
        prompt: Prompt,
        *,
        messages: Sequence[dict[str, Any]] = (),
        details: Mapping[str, Any] | None = None,
        option: str = "--save-state",
        progress: bool = False,
        adapter: str | None = None,
    ) -> int:
        """Save the cached keys and values of the longest cached prefix of a prompt. Returns its number of tokens.

        Usually the prompt is an earlier prompt with its answer, by this `adapter`. `messages` and `details`, JSON
        values, are saved too.
        `option` names the path in error messages; `progress` shows a bar if it takes more than two seconds. Raises
        PromptError if nothing is cached, SatchelError if the file cannot be written.
        """
        ids = self.encode(prompt)
        count, cache = self.prefix_cache.longest_saved(ids, adapter)
        if cache is None:
            raise PromptError(
                "nothing of this prompt is in the prefix cache: generate first, or raise --prefix-cache-mib"
            )
        state = SavedState(Prefix(ids[:count], cache), tuple(messages), dict(details or {}))
        write_state(path, self.engine.bundle.fingerprint, state, option, progress=progress)
        return count

    def load_state(
        self,
        path: str | Path,
        *,
        check: Callable[[SavedState], object] = lambda state: None,
        progress: bool = False,
        adapter: str | None = None,
    ) -> SavedState:
        """Read a saved state into the prefix cache: prompts that begin with `state.prefix.ids` prefill only the rest.

        `check` may raise before anything is cached. Raises what `read_state` does, and PromptError for a state that
        exceeds `max_context` or the prefix cache, or was saved with another adapter than `adapter`.
        """
        bundle, positions = self.engine.bundle, self.prefix_cache.max_positions
        accept = partial(check_size, path, bundle, self.max_context, positions)
        state = read_state(path, bundle, accept, progress=progress)
        check_adapter(path, state, adapter)
        check(state)
        self.prefix_cache.put(state.prefix)
        return state

    def check_grammar(self, grammar: Grammar) -> None:
        """Raise PromptError for a grammar that cannot be compiled for this bundle."""
        self._grammars.check(grammar)

    def new_sequence(
        self, request: Request, choose: Choose | Sampler | None = None, callback: Callback | None = None
    ) -> ActiveSequence:
        """A checked request that is ready to run. Raises PromptError."""
        ids, options = self.encode(request.prompt), request.options
        options.check_all(self.engine.vocabulary)
        if request.timeout is not None and not 0 < request.timeout < math.inf:
            raise PromptError(f"a timeout of {request.timeout} seconds is not possible: give a number above 0")
        self.engine.adapters.check(options.adapter)
        if options.stop:
            self.need_tokenizer()
        self._check_length(ids)
        limit, ends = min(options.max_new_tokens, self.max_context - len(ids) + 1), self._end_tokens(options)
        text = IncrementalDetokenizer(self.tokenizer, ids.tolist(), request.visible) if self.tokenizer else None
        if choose is None:
            choose = Sampler(options, ends, self.engine.vocabulary, ids, request.sample, limit)
        special = self.tokenizer.is_hidden if self.tokenizer else lambda token: False
        multiple = self.engine.bundle.manifest.token_multiple
        snapshots = snapshots_of(ids, special, multiple, self.prefix_cache.max_snapshots)
        constraint = None
        if options.grammar is not None or options.max_thinking_tokens is not None:
            source = self.template.sources[self.template.choose(None, None)] if self.has_template else ""
            constraint = self._grammars.constraint(options, ids, ends, source)
        sequence = ActiveSequence(ids, options, limit, choose, ends, text, callback, snapshots, constraint)
        if self.speculation is not None:
            sequence.drafter = self.speculation.drafter(sequence, choose if isinstance(choose, Sampler) else None)
        return sequence

    def _run_all(self, requests: Sequence[Request], *, rows: int, force_batch: bool = False) -> list[Generation]:
        """The results of requests, in order. Raises the first error."""
        found: dict[int, Generation] = {}
        for index, outcome in self.run_requests(requests, rows=rows, force_batch=force_batch):
            if isinstance(outcome, SatchelError):
                raise outcome
            found[index] = outcome
        return [found[index] for index in range(len(requests))]

    def _end_tokens(self, options: GenerationOptions) -> frozenset[int]:
        """The model's end tokens, and special tokens among the stop strings: those have no text to look for."""
        ends = set(self.engine.bundle.manifest.model.eos_token_ids)
        if self.tokenizer:
            ends |= {token for text in options.stop if (token := self.tokenizer.special_token(text)) is not None}
        return frozenset(ends)
