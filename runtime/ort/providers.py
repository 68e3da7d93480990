"""The supported execution providers, as data, and the user's choice of one. Standard library only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from satchel.runtime.bundle.manifest import Manifest
from satchel.runtime.errors import ProviderError
from satchel.runtime.util.defaults import PROVIDER

DEVICE_ID = "device_id"
CUDA_GRAPH = "enable_cuda_graph"

SHAPE_ARITHMETIC = frozenset({
    "Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Identity", "Max", "Min", "Mul",
    "Range", "ReduceMax", "ReduceProd", "ReduceSum", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze",
    "Where",
})  # fmt: skip
"""Operators of ai.onnx that compute with shapes and lengths, among other things."""


@dataclass(frozen=True)
class Provider:
    """An execution provider of ONNX Runtime.

    Attributes:
        ort_name: Its name in ONNX Runtime.
        targets: The targets of `satchel export` whose bundles it runs; None: all.
        package: The package of ONNX Runtime that includes it.
        defaults: Options that it gets unless the user sets them.
        further: Other options that a user may set.
        on_cpu: Operator types that are expected on the CPU beside this provider: arithmetic on shapes, which costs less
            there than the transfer to the device and back.
        device_memory: Whether its graphs use memory of a device.
        whole_graphs: Whether it compiles a graph as a whole, after ONNX Runtime has folded its constants.
    """

    ort_name: str
    targets: tuple[str, ...] | None
    package: str
    defaults: Mapping[str, str] = field(default_factory=dict)
    further: tuple[str, ...] = ()
    on_cpu: frozenset[str] = frozenset()
    device_memory: bool = False
    whole_graphs: bool = False

    @property
    def options(self) -> list[str]:
        """The names of all options that may be set."""
        return sorted({*self.defaults, *self.further})


PROVIDERS = {
    "cpu": Provider(ort_name="CPUExecutionProvider", targets=None, package="onnxruntime"),
    "cuda": Provider(
        ort_name="CUDAExecutionProvider",
        targets=("cuda",),
        package="onnxruntime-gpu",
        defaults={
            DEVICE_ID: "0",
            "arena_extend_strategy": "kSameAsRequested",  # the large buffers never change size
            CUDA_GRAPH: "1",
            "use_tf32": "0",  # float32 in the graph is intended
        },
        further=(
            "cudnn_conv1d_pad_to_nc1d",
            "cudnn_conv_algo_search",
            "cudnn_conv_use_max_workspace",
            "do_copy_in_default_stream",
            "enable_skip_layer_norm_strict_mode",
            "fuse_conv_bias",
            "gpu_mem_limit",
            "prefer_nhwc",
            "sdpa_kernel",
            "tunable_op_enable",
            "tunable_op_max_tuning_duration_ms",
            "tunable_op_tuning_enable",
            "use_ep_level_unified_stream",
        ),
        on_cpu=SHAPE_ARITHMETIC,
        device_memory=True,
    ),
    "cann": Provider(
        ort_name="CANNExecutionProvider",
        targets=("cann",),
        package="onnxruntime-cann",
        defaults={
            DEVICE_ID: "0",
            "arena_extend_strategy": "kSameAsRequested",
            "dump_om_model": "1",  # the next process reuses compiled graphs
            "enable_cann_graph": "1",
            "enable_cann_subgraph": "0",
            "precision_mode": "must_keep_origin_dtype",  # by default norms in float32 would become float16
        },
        further=("dump_graphs", "npu_mem_limit", "op_select_impl_mode", "optypelist_for_implmode"),
        device_memory=True,
        whole_graphs=True,
    ),
}
"""By the names that users give. Options are those of ONNX Runtime 1.24 to 1.31 for cuda, and of 1.24.4 for cann."""


@dataclass(frozen=True)
class ProviderChoice:
    """The user's choice: a provider, its options, and whether all nodes must run on it (`strict`)."""

    name: str = PROVIDER
    options: Mapping[str, str] = field(default_factory=dict)
    strict: bool = False

    def check(self) -> None:
        """Raise ProviderError for an unknown provider or option."""
        if self.name not in PROVIDERS:
            raise ProviderError(f"--provider {self.name}: unknown: choose one of {', '.join(PROVIDERS)}")
        known = PROVIDERS[self.name].options
        for key, value in self.options.items():
            if key not in known:
                which = f"choose one of {', '.join(known)}" if known else "this provider has none"
                raise ProviderError(f"--provider-option {key}={value}: {self.name} has no such option: {which}")

    @property
    def device(self) -> int:
        """The number of the device. Raises ProviderError if the option is not a number."""
        given = self.options.get(DEVICE_ID, PROVIDERS[self.name].defaults.get(DEVICE_ID, "0"))
        if not (given.isascii() and given.isdecimal()):
            raise ProviderError(f"--provider-option {DEVICE_ID}={given}: must be a whole number, 0 or more")
        return int(given)

    def session_options(self, manifest: Manifest) -> dict[str, str]:
        """The provider's options for sessions of a bundle: the defaults, overridden by the user's.

        Without a decode mask of fixed length shapes change at every step, so nothing can be captured. Exchanges between
        devices are not captured either, since no device has tried that.
        """
        found = dict(PROVIDERS[self.name].defaults)
        if CUDA_GRAPH in found and (not manifest.has_fixed_mask or manifest.rank is not None):
            found[CUDA_GRAPH] = "0"
        return found | dict(self.options)


CPU = ProviderChoice()


def check_target(choice: ProviderChoice, target: str) -> None:
    """Raise ProviderError if a provider does not run bundles for this target."""
    targets = PROVIDERS[choice.name].targets
    if targets is not None and target not in targets:
        raise ProviderError(
            f"--provider {choice.name}: this bundle was exported for {target}: "
            f"export it again with --target {targets[0]}, or leave --provider out"
        )


def check_installed(choice: ProviderChoice, there: Sequence[str]) -> None:
    """Raise ProviderError if the installed ONNX Runtime, which has the providers `there`, lacks this one."""
    wanted = PROVIDERS[choice.name]
    if wanted.ort_name not in there:
        raise ProviderError(
            f"--provider {choice.name}: this ONNX Runtime has no {wanted.ort_name}, only {', '.join(there)}: "
            f"choose another provider, or install {wanted.package} instead"
        )
