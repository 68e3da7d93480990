"""The rules of each provider, as data: the check, its severity, the reason and the remedy."""

from __future__ import annotations

from collections.abc import Mapping

from satchel.graphs.providers import cann_device, cann_parser, cpu_rules, cuda_kernels, cuda_speed, kernel_rules
from satchel.graphs.providers.findings import ERROR, INFO, WARNING, Rule

FOR_CANN = "export with --target cann"
FOR_CUDA = "export with --target cuda"
NOTHING = ""

CANN = (
    Rule(
        "C01", ERROR, "the parser does not support the opset",
        "the parser looks up each operator by the graph's opset, and has entries for opsets 8 to 18", FOR_CANN,
        cann_parser.opset_in_range, of_file=True,
    ),
    Rule(
        "C02", ERROR, "an operator is outside the ai.onnx domain",
        "the provider passes on ai.onnx operators only, and the parser has no entries for other domains", FOR_CANN,
        cann_parser.standard_domain,
    ),
    Rule(
        "C03", ERROR, "the parser has no entry for an operator",
        "the first run fails with error E16002; if only the released parsers lack the entry, it may work, since they "
        "have closed-source parts",
        FOR_CANN + ", or express it with operators that have one", cann_parser.parser_entry,
    ),
    Rule(
        "C04", ERROR, "the graph has a quantized operator",
        "the parser has no entry for any of them; session.disable_quant_qdq=1 removes them from weights, not "
        "from activations",
        FOR_CANN + ", which stores weights as float16", cann_parser.no_quantized,
    ),
    Rule(
        "C05", ERROR, "an input has no static shape",
        "a graph is compiled for one shape; scalar inputs and dimensions of size 0 are rejected", FOR_CANN,
        cann_parser.static_inputs,
    ),
    Rule(
        "C06", ERROR, "the graph is too large",
        "the provider passes the graph on as one message with its weights, which must be smaller than 2 GiB",
        FOR_CANN + ", which splits it", cann_parser.below_two_gigabytes,
    ),
    Rule(
        "C07", ERROR, "the graph has control flow",
        "the parser has no entry for loops; with enable_cann_subgraph, branches run on the CPU",
        "unroll it", cann_parser.no_loops,
    ),
    Rule(
        "C08", WARNING, "an operator is not in the provider's list",
        "with enable_cann_subgraph it runs on the CPU and splits the graph in two", "leave enable_cann_subgraph at 0",
        cann_parser.whitelisted,
    ),
    Rule(
        "C09", WARNING, "a shape depends on data",
        "the device stalls, and copies to the host, to learn the size of the result",
        "compute shapes beforehand, and pass masks as inputs", cann_device.shapes_known,
    ),
    Rule(
        "C10", WARNING, "a name has characters other than letters, digits, . _ -",
        "the graph's name becomes a file name, and ';' and ',' are separators in input shapes", "rename it",
        cann_device.names_are_plain,
    ),
    Rule(
        "C11", WARNING, "one of several outputs of a node is not read inside the graph",
        "the outputs of such a node are found through their consumers, so this one may be lost",
        "compute it with a separate node", cann_device.outputs_have_edges,
    ),
    Rule(
        "C12", WARNING, "an input is unused, or an output is not computed",
        "inputs and outputs are matched by position, and the device compiler may drop these", "remove it",
        cann_device.inputs_and_outputs_are_computed,
    ),
    Rule(
        "C13", WARNING, "a constant is outside the float16 range",
        "the default precision mode converts everything to float16, and -inf in a mask yields rows of NaN",
        "use -65504 or a smaller magnitude", cann_device.constants_are_finite,
    ),
    Rule(
        "C14", WARNING, "bfloat16", "only Atlas A2, A3, 950 and 200I/500 A2 support it", "use float16",
        cann_device.no_bfloat16,
    ),
    Rule(
        "C15", WARNING, "float64, or int64 arithmetic",
        "most device kernels support neither, and the device's own CPU is slow",
        "use float32 or int32, and int64 only for ids, indices and shapes", cann_device.no_wide_types,
    ),
    Rule(
        "C16", WARNING, "the KV cache is written by a scatter",
        "in released toolkits ScatterND only has a kernel for the device's own CPU, and ScatterElements has none on "
        "310P",
        "write it with Where and a mask of rows", cann_device.cache_written_by_where,
    ),
    Rule(
        "C17", WARNING, "LayerNormalization",
        "only the parser's development branch has an entry, and it is not in the provider's list; from opset 17 on, "
        "ONNX Runtime fuses its parts into one", "export such a model at opset 16", cann_parser.no_layer_normalization,
    ),
    Rule(
        "C18", ERROR, "the IR version is too new",
        "onnxruntime-cann 1.24.4 supports IR versions up to 13", "write the file with IR version 8",
        cann_parser.ir_version, of_file=True,
    ),
    Rule(
        "C19", WARNING, "the graph outputs indices",
        "the device returns int32, and ONNX specifies int64", "select tokens on the host, from the logits",
        cann_device.indices_stay_inside,
    ),
    Rule(
        "C20", WARNING, "an operand of Slice, Split, Expand or Reshape is computed",
        "the toolkit finds a device kernel only if these operands are constant; otherwise the device's own CPU runs "
        "the node",
        FOR_CANN, cann_device.operands_are_constant,
    ),
)  # fmt: skip

CUDA = (
    Rule(
        "U01", ERROR, "an operator has no kernel",
        "it silently runs on the CPU, with copies around it", FOR_CUDA, kernel_rules.operator_has_kernel,
    ),
    Rule(
        "U02", ERROR, "no kernel matches the version of an operator",
        "a kernel registered from a version on matches only that version", "export at a lower opset, or use "
        "another ONNX Runtime", kernel_rules.version_has_kernel,
    ),
    Rule(
        "U03", ERROR, "no kernel matches these types",
        "the node runs on the CPU, with copies around it; GroupQueryAttention, for example, has no float32 kernel",
        FOR_CUDA, cuda_kernels.types_have_kernel,
    ),
    Rule(
        "U04", ERROR, "QuantizeLinear or DequantizeLinear of a type without a kernel",
        "there is no kernel for int32 (as in a quantized bias) and int16, nor for float16 up to opset 18",
        "keep biases in float", cuda_kernels.quantized_types_have_kernel,
    ),
    Rule(
        "U05", ERROR, "Where, CumSum or Range of a type without a kernel",
        "Where has no kernel for int8 and bool, CumSum none for bfloat16, Range none for float16",
        "insert casts, or compute it on the host", cuda_kernels.narrow_types_have_kernel,
    ),
    Rule(
        "U06", ERROR, "the provider excludes this form of an operator",
        "casts to string, and ArgMax and ArgMin with select_last_index, run on the CPU", "rewrite the node",
        cuda_kernels.not_excluded,
    ),
    Rule(
        "U07", WARNING, "the provider supports an operator in part",
        "the provider supports only some forms of RNN, GRU, LSTM and ConvTranspose", "test it with "
        "session.disable_cpu_ep_fallback=1", cuda_kernels.partly_supported,
    ),
    Rule(
        "U08", INFO, "shape arithmetic stays on the CPU",
        "ONNX Runtime prefers the CPU for it, since its inputs are in host memory", NOTHING,
        cuda_kernels.shapes_on_host,
    ),
    Rule(
        "U09", INFO, "a copy between host and device in each prefill",
        "a value is produced in one memory and read in the other; the cost is once per prompt", NOTHING,
        cuda_kernels.no_copies,
    ),
    Rule(
        "U10", WARNING, "a copy between host and device in decode",
        "every token waits for it, and a CUDA graph cannot contain it", FOR_CUDA, cuda_kernels.no_copies_in_decode,
    ),
    Rule(
        "U11", WARNING, "decode has shapes that change per token",
        "a CUDA graph is captured for fixed shapes and addresses; dimensions of the cache buffers count as fixed",
        FOR_CUDA, cuda_speed.decode_has_fixed_shapes,
    ),
    Rule(
        "U12", WARNING, "decode has control flow",
        "a CUDA graph cannot contain it", "unroll it", cuda_speed.decode_has_no_control_flow,
    ),
    Rule(
        "U13", WARNING, "activations are quantized",
        "the provider has no int8 matmul for these patterns: it quantizes, then multiplies in float",
        "choose a precision with float activations, such as a16w8", cuda_speed.activations_in_float,
    ),
    Rule(
        "U14", WARNING, "a quantized weight is dequantized in every run",
        "it does not have the form that ONNX Runtime fuses into MatMulNBits",
        "pass it directly to a single MatMul, with per-channel scales or scales per group of inputs",
        cuda_speed.weights_are_fused,
    ),
    Rule(
        "U15", WARNING, "the KV cache is read while it is written",
        "past and present share memory, and the read may run before or after the write",
        "read the result of the write", cuda_speed.cache_read_after_write,
    ),
    Rule(
        "U16", ERROR, "the IR version is too new",
        "ONNX Runtime 1.24.4 loads up to 13", "write the file with IR version 8 to 13", cuda_kernels.ir_version,
        of_file=True,
    ),
    Rule(
        "U17", INFO, "a type is unknown",
        "whether a kernel supports it is not verified", NOTHING, kernel_rules.types_are_known,
    ),
    Rule(
        "U18", WARNING, "a custom operator",
        "if its library has no kernel for the device, it runs on the CPU, with copies around it",
        "run it with --no-custom-ops if its library has none", kernel_rules.operator_of_library,
    ),
)  # fmt: skip

CPU = (
    Rule(
        "P01", ERROR, "an operator has no kernel",
        "ONNX Runtime cannot open the graph", "export again, or install the ONNX Runtime that made the bundle",
        kernel_rules.operator_has_kernel,
    ),
    Rule(
        "P02", ERROR, "no kernel matches the version of an operator",
        "ONNX Runtime cannot open the graph", "install a newer ONNX Runtime, or export at a lower opset",
        kernel_rules.version_has_kernel,
    ),
    Rule(
        "P03", ERROR, "no kernel matches these types",
        "ONNX Runtime cannot open the graph", "export with another precision", cpu_rules.types_have_kernel,
    ),
    Rule(
        "P04", WARNING, "no kernel for float16",
        "ONNX Runtime inserts casts and runs the node in float32: correct, but slow", "export with --target cpu",
        cpu_rules.float16_has_kernel,
    ),
    Rule(
        "P05", INFO, "a type is unknown",
        "whether a kernel supports it is not verified", NOTHING, kernel_rules.types_are_known,
    ),
    Rule(
        "P06", INFO, "a custom operator",
        "satchel ships its own library; pass any other with --custom-ops when the bundle is run",
        NOTHING, kernel_rules.operator_of_library,
    ),
)  # fmt: skip

RULES: Mapping[str, tuple[Rule, ...]] = {"cann": CANN, "cuda": CUDA, "cpu": CPU}
"""The rules of each provider, by its name in the --provider option."""
