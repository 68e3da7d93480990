"""Opens ONNX Runtime sessions for a bundle's graphs: providers, threads, options and the check of the signature."""

from __future__ import annotations

import concurrent.futures
import os
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from satchel.runtime.bundle.dtypes import DTYPES
from satchel.runtime.bundle.graph_specs import GraphSpec, TensorSpec
from satchel.runtime.bundle.manifest import MANIFEST_NAME, Manifest, Specialized
from satchel.runtime.bundle.ranks import MPI, NCCL
from satchel.runtime.bundle.reader import Bundle
from satchel.runtime.errors import BundleError, SatchelError, SatchelWarning
from satchel.runtime.kernels import library
from satchel.runtime.ort.attention import attention
from satchel.runtime.ort.collectives import check_collectives
from satchel.runtime.ort.custom_ops import digest_of
from satchel.runtime.ort.graph_file import graph_file
from satchel.runtime.ort.providers import CPU, PROVIDERS, ProviderChoice, check_installed, check_target
from satchel.runtime.util.cpu import usable_cores, usable_cpus
from satchel.runtime.util.memory import release_freed, use_one_arena

# The only session entries that a manifest may set: none of them names a file.
ALLOWED_CONFIG = (
    "session.disable_prepacking",
    "session.disable_quant_qdq",
    "session.enable_quant_qdq_cleanup",
    "session.qdq_matmulnbits_accuracy_level",
    "session.qdq_matmulnbits_block_size",
    "session.use_device_allocator_for_initializers",
    "session.use_env_allocators",
    "session.x64quantprecision",
    "mlas.enable_gemm_fastmath_arm64_bfloat16",
)

# ONNX Runtime's exceptions have no common base class; a message that is not UTF-8 raises UnicodeDecodeError.
ORT_ERRORS = (
    RuntimeError,
    UnicodeDecodeError,
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)

LOG_VERBOSE, LOG_FATAL = 0, 4

SPIN_MICROSECONDS = "100"
"""How long ONNX Runtime's threads look for work before they sleep, in a session with satchel's own kernels."""


@dataclass(frozen=True)
class SessionSettings:
    """The user's settings for sessions.

    `threads` None means one per physical core that this process may use. `lean` keeps weights as they are stored and
    frees each result once it is read: memory does not grow with the model, but every run expands float16 weights again.
    `profile` makes each session write a profile of its runs on `Engine.end_profiling`, into a file whose path starts
    with it. `alone` runs one rank's part of a model without the others, to measure it: its results are of no use.
    """

    provider: ProviderChoice = CPU
    threads: int | None = None
    verbose: bool = False
    lean: bool = False
    profile: Path | None = None
    alone: bool = False


def open_session(
    bundle: Bundle, phase: str, settings: SessionSettings, change: Callable[[bytes], bytes] | None = None
) -> ort.InferenceSession:
    """Open the graph of `phase` ("prefill", "decode" or "score"), as `change` returns it.

    Raises ProviderError for a provider that is unknown or not installed, and BundleError if the graph does not load or
    its inputs and outputs differ from those in the manifest.
    """
    _check_provider(bundle, settings)
    made = specialized_for(bundle, settings)
    prepared = None if made is None else made.graphs.get(phase)
    source = phase if prepared is None or prepared.variant is None else prepared.variant
    graph = bundle.manifest.graph(source)
    name, options = graph.file, _session_options(bundle, source, settings)
    if prepared is not None:
        name = prepared.file
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # it is optimized already
    plain = made is not None and phase in made.graphs and not made.tiled_attention
    session = _open(bundle, name, options, settings, plain, change)
    _check_signature(bundle, graph, session)
    return session


def open_part(bundle: Bundle, part: GraphSpec, key: str, settings: SessionSettings) -> ort.InferenceSession:
    """Open one part of a static graph; `key` is its place in the manifest. Raises what `open_session` does."""
    _check_provider(bundle, settings)
    options = _basic_options(settings, key)
    _add_entries(options, _entries(part, settings), f"{bundle.folder / MANIFEST_NAME}: {key}")
    _register(options, bundle.custom_ops)
    session = _open(bundle, part.file, options, settings)
    _check_signature(bundle, part, session)
    _check_shapes(bundle, part, session)
    return session


def open_both(bundle: Bundle, settings: SessionSettings) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    """Open prefill and decode in parallel, or in one session if the manifest or the specialized graphs say so.

    Raises ProviderError and BundleError.
    """
    phases = ("prefill",) if _in_one_session(bundle, settings) else ("prefill", "decode")
    with concurrent.futures.ThreadPoolExecutor(len(phases)) as threads:
        sessions = list(threads.map(lambda phase: open_session(bundle, phase, settings), phases))
    release_freed()
    return sessions[0], sessions[-1]


def _in_one_session(bundle: Bundle, settings: SessionSettings) -> bool:
    made = specialized_for(bundle, settings)
    return bundle.manifest.graph("decode").session_of == "prefill" if made is None else "decode" not in made.graphs


def specialized_for(bundle: Bundle, settings: SessionSettings) -> Specialized | None:
    """The graphs that were made for this machine, if these sessions are to use them."""
    made = bundle.specialized
    return made if made is not None and made.provider == settings.provider.name and not settings.lean else None


def save_optimized(
    bundle: Bundle, name: str, graph: Path, settings: SessionSettings, path: Path, inline_bytes: int
) -> None:
    """Write a graph as ONNX Runtime optimizes it for this processor to `path`.

    It gets the session entries of the phase or the variant `name`.

    Constants of `inline_bytes` or more, and the weights as kernels packed them, are written next to it, into a file
    with the suffix ".data". Raises ProviderError and BundleError.
    """
    options = _session_options(bundle, name, settings)
    options.optimized_model_filepath = str(path)
    for key, value in (
        ("session.optimized_model_external_initializers_file_name", path.with_suffix(".data").name),
        ("session.optimized_model_external_initializers_min_size_in_bytes", str(inline_bytes)),
        ("session.save_external_prepacked_constant_initializers", "1"),
    ):
        options.add_session_config_entry(key, value)
    _check_provider(bundle, settings)
    _started(graph, options, settings.provider, bundle.manifest, [], graph)


def prepare_process(threads: int | None = None) -> None:
    """Prepare a process of satchel's own, such as a command, for sessions with `threads` threads, before the first one.

    All threads allocate from one heap, which needs less memory. Warns if the process has fewer CPUs. None means one
    thread per physical core. Raises SatchelError for less than one thread.
    """
    wanted = default_threads() if threads is None else threads
    _check_threads(wanted)
    if wanted > usable_cpus():
        warnings.warn(
            f"--threads {wanted}: this process has {usable_cpus()} CPUs, and more threads than that are slower",
            SatchelWarning,
            stacklevel=2,
        )
    use_one_arena()


def _open(
    bundle: Bundle,
    name: str,
    options: ort.SessionOptions,
    settings: SessionSettings,
    plain_attention: bool = False,
    change: Callable[[bytes], bytes] | None = None,
) -> ort.InferenceSession:
    """Open a graph file of a bundle; on a device, check that its nodes run there."""
    disabled = ["ConstantFolding"] if settings.lean else []
    path, choice = bundle.folder / name, settings.provider
    prepared = None
    if PROVIDERS[choice.name].device_memory:
        from satchel.runtime.ort.experimental.device_session import DeviceSession

        prepared = DeviceSession(bundle, name, options, choice)
    graph = graph_file(bundle, name, options, change)
    with attention.of(plain_attention):
        session = _started(graph, options, choice, bundle.manifest, disabled, path)
    if prepared is not None:
        prepared.check(session)
    weakref.finalize(session, library.drain_helpers)
    return session


def _started(
    graph: Path | bytes,
    options: ort.SessionOptions,
    choice: ProviderChoice,
    manifest: Manifest,
    disabled: list[str],
    name: Path,
) -> ort.InferenceSession:
    provider = PROVIDERS[choice.name].ort_name, choice.session_options(manifest)
    try:
        session = ort.InferenceSession(
            graph, options, providers=[provider], disabled_optimizers=disabled, enable_fallback=0
        )
    except ORT_ERRORS as error:
        reason = " ".join(str(error).split())
        raise BundleError(
            f"{name}: ONNX Runtime {ort.__version__} cannot load it ({reason}): "
            "export the bundle again, or use the ONNX Runtime named in its manifest"
        ) from None
    return session


def default_threads() -> int:
    """The number of physical cores among the CPUs that this process may use; of logical CPUs off Linux."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return len(usable_cores())


def _session_options(bundle: Bundle, graph: str, settings: SessionSettings) -> ort.SessionOptions:
    """The options of a session for the graph of a phase, or for a variant, by its name."""
    options = _basic_options(settings, graph)
    if _in_one_session(bundle, settings):  # otherwise two sessions are opened in parallel, each on one thread
        options.add_session_config_entry("session.prepack.enable_parallel", "1")
    options.enable_mem_pattern = False  # shapes change at each step, and a plan for each takes memory
    entries = _entries(bundle.manifest.graph(graph), settings)
    _add_entries(options, entries, f"{bundle.folder / MANIFEST_NAME}: {graph}")
    _register(options, bundle.custom_ops)
    own = any(each.name == graph and each.kernel_abi is not None for each in bundle.manifest.variants)
    if own or _exchanges(bundle) == MPI:
        options.add_session_config_entry("satchel.helpers", str(_helpers(settings)))
        # Some nodes of a step for one token run on ONNX Runtime's threads, which must not spin long beside the helpers.
        options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN_MICROSECONDS)
        _register_own(options)
    return options


def _threads(settings: SessionSettings) -> int:
    return default_threads() if settings.threads is None else settings.threads


def _helpers(settings: SessionSettings) -> int:
    """How many threads help the own kernels with the work for one token, instead of ONNX Runtime's."""
    threads = _threads(settings)
    return 0 if settings.lean or threads > default_threads() else threads - 1  # they wait by looking: each needs a CPU


def _basic_options(settings: SessionSettings, name: str) -> ort.SessionOptions:
    """Options for threads, logs, profile and provider; `name` of the graph is part of the profile's name."""
    options = ort.SessionOptions()
    options.log_severity_level = LOG_VERBOSE if settings.verbose else LOG_FATAL
    options.intra_op_num_threads = _threads(settings)
    options.inter_op_num_threads = 1
    _check_threads(options.intra_op_num_threads)
    # A waiting thread must not take a CPU from a working one; lean sessions are those of checks, beside others.
    if settings.lean or options.intra_op_num_threads > default_threads():
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Threads that keep spinning after a run take cores from the session of the other phase.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if settings.profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = f"{settings.profile}-{name}"
    if PROVIDERS[settings.provider.name].whole_graphs:
        # Constants are folded before the provider sees the graph; more rewriting would only hinder it.
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if settings.lean:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.enable_cpu_mem_arena = False
        # The default order first computes everything that depends on weights only, and keeps it.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    return options


def _entries(graph: GraphSpec, settings: SessionSettings) -> dict[str, str]:
    """The session configuration entries of a graph."""
    return graph.session | ({"session.disable_prepacking": "1"} if settings.lean else {})


def entry_options(entries: Mapping[str, str], where: str) -> ort.SessionOptions:
    """Options with a manifest's session entries and one thread, for opening a graph without running it.

    `where` names the graph in messages. Raises BundleError for an entry that a bundle may not set.
    """
    options = ort.SessionOptions()
    options.log_severity_level = LOG_FATAL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    _add_entries(options, entries, where)
    return options


def _add_entries(options: ort.SessionOptions, entries: Mapping[str, str], where: str) -> None:
    for key, value in entries.items():
        if key not in ALLOWED_CONFIG:
            raise BundleError(
                f"{where}.session: a bundle may not set '{key}': remove it or use one of {', '.join(ALLOWED_CONFIG)}"
            )
        options.add_session_config_entry(key, value)


def check_loads(libraries: Sequence[Path]) -> None:
    """Check that ONNX Runtime loads these libraries of operators. Raises BundleError."""
    _register(ort.SessionOptions(), libraries)


def _register(options: ort.SessionOptions, libraries: Sequence[Path]) -> None:
    for path in libraries:
        digest_of(path)  # a clearer message if the file is missing
        try:
            options.register_custom_ops_library(str(path.resolve()))
        except ORT_ERRORS as error:
            reason = " ".join(str(error).split())
            raise BundleError(
                f"--custom-ops {path}: ONNX Runtime cannot load it ({reason}): pass a shared library with operators"
            ) from None


def _register_own(options: ort.SessionOptions) -> None:
    """Register satchel's own operators. Raises BundleError."""
    path = library.library()
    if path is None:
        raise BundleError(f"satchel's own kernels {library.reason()}")
    try:
        options.register_custom_ops_library(str(path))
    except ORT_ERRORS as error:
        reason = " ".join(str(error).split())
        raise BundleError(
            f"{path}: ONNX Runtime {ort.__version__} cannot load it ({reason}): install satchel again, or set "
            f"{library.SWITCH}={library.OFF}"
        ) from None


def _check_threads(threads: int) -> None:
    if threads < 1:
        raise SatchelError(f"--threads {threads}: there must be at least 1 thread")


def _check_provider(bundle: Bundle, settings: SessionSettings) -> None:
    settings.provider.check()
    check_target(settings.provider, bundle.manifest.target)
    if _exchanges(bundle) == NCCL:
        check_collectives(bundle.folder, settings.provider.name)
    check_installed(settings.provider, ort.get_available_providers())


def _exchanges(bundle: Bundle) -> str | None:
    """By which library a part of a model exchanges numbers with the others; None for a whole one."""
    return None if bundle.manifest.rank is None else bundle.manifest.rank.collectives


def _check_signature(bundle: Bundle, graph: GraphSpec, session: ort.InferenceSession) -> None:
    path = bundle.folder / graph.file
    try:
        adapted = tuple(tensor for adapter in bundle.manifest.adapters for tensor in adapter.inputs)
        inputs = (*session.get_inputs(), *session.get_overridable_initializers())
        sides = (
            ("inputs", (*graph.inputs, *adapted), {(tensor.name, tensor.type) for tensor in inputs}),
            ("outputs", graph.outputs, {(tensor.name, tensor.type) for tensor in session.get_outputs()}),
        )
        sizes = {tensor.name: tuple(tensor.shape) for tensor in (*inputs, *session.get_outputs())}
    except UnicodeDecodeError:
        raise BundleError(f"{path}: a name in it is not UTF-8: export the bundle again") from None
    for side, declared, found in sides:
        differing = sorted(_declared_types(declared) ^ found)
        if differing:
            raise BundleError(
                f"{path}: its {side} differ from those in the manifest "
                f"(first difference: {' '.join(differing[0])}): export the bundle again"
            )
    for tensor in (*graph.inputs, *adapted, *graph.outputs):
        pairs = zip(tensor.shape, sizes[tensor.name], strict=False)
        if any(isinstance(one, int) and isinstance(other, int) and one != other for one, other in pairs):
            raise _wrong_shape(path, tensor, sizes[tensor.name])


def _check_shapes(bundle: Bundle, part: GraphSpec, session: ort.InferenceSession) -> None:
    found = {tensor.name: tuple(tensor.shape) for tensor in (*session.get_inputs(), *session.get_outputs())}
    for tensor in (*part.inputs, *part.outputs):
        if found[tensor.name] != tensor.shape:
            raise _wrong_shape(bundle.folder / part.file, tensor, found[tensor.name])


def _wrong_shape(path: Path, tensor: TensorSpec, found: tuple[int | str, ...]) -> BundleError:
    return BundleError(
        f"{path}: {tensor.name} is {list(found)} where the manifest says {list(tensor.shape)}: export the bundle again"
    )


def _declared_types(tensors: tuple[TensorSpec, ...]) -> set[tuple[str, str]]:
    return {(tensor.name, DTYPES[tensor.dtype].tensor) for tensor in tensors}
