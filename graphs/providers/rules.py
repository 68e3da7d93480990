"""The rules of each provider, as data: what is checked, how bad it is, why, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

from satchel.graphs.providers import cann_device, cann_parser, cpu_rules, cuda_kernels, cuda_speed, kernel_rules
from satchel.graphs.providers.findings import ERROR, INFO, WARNING, Rule

FOR_CANN = "export with --target cann"
FOR_CUDA = "export with --target cuda"
NOTHING = ""

CANN = (
    Rule(
        "C01", ERROR, "the opset is none of the parser's",
        "the parser looks an operator up by the graph's opset, and has entries for 8 to 18", FOR_CANN,
        cann_parser.opset_in_range, of_file=True,
    ),
    Rule(
        "C02", ERROR, "an operator is not of ai.onnx",
        "the provider hands over no other domain, and the parser has entries for none", FOR_CANN,
        cann_parser.standard_domain,
    ),
    Rule(
        "C03", ERROR, "the parser has no entry for an operator",
        "the first run ends with error E16002, or may not where only released parsers lack it, which have closed parts",
        FOR_CANN + ", or express it by operators that have one", cann_parser.parser_entry,
    ),
    Rule(
        "C04", ERROR, "a quantized operator is left",
        "the parser has no entry for any of them; weights alone disappear when session.disable_quant_qdq is 1",
        FOR_CANN + ": weights become float16", cann_parser.no_quantized,
    ),
    Rule(
        "C05", ERROR, "an input has no fixed shape",
        "a graph is compiled for one shape; a dimension of 0 and an input without dimensions are rejected", FOR_CANN,
        cann_parser.static_inputs,
    ),
    Rule(
        "C06", ERROR, "the graph is too large",
        "it is handed over in one piece with its weights, of less than 2 GiB", FOR_CANN + ", which divides it",
        cann_parser.below_two_gigabytes,
    ),
    Rule(
        "C07", ERROR, "the graph has control flow",
        "the parser has no entry for loops; branches are not taken where the provider looks at each node",
        "unroll it", cann_parser.no_loops,
    ),
    Rule(
        "C08", WARNING, "the provider's list lacks an operator",
        "with enable_cann_subgraph it runs on the CPU and cuts the graph in two", "leave enable_cann_subgraph at 0",
        cann_parser.whitelisted,
    ),
    Rule(
        "C09", WARNING, "a shape depends on data",
        "the device stops and copies to learn how large the result is", "compute shapes before, and hand in masks",
        cann_device.shapes_known,
    ),
    Rule(
        "C10", WARNING, "a name has other characters than letters, digits, . _ -",
        "the graph's name becomes a file's, and ';' and ',' end an input's shape", "rename it",
        cann_device.names_are_plain,
    ),
    Rule(
        "C11", WARNING, "an output of a node with several has no reader inside",
        "outputs of such a node are found through their readers, and this one may get lost",
        "make it by a node of its own", cann_device.outputs_have_edges,
    ),
    Rule(
        "C12", WARNING, "an input is not read, or an output not computed",
        "inputs and outputs are matched by position, and the device's compiler may drop these", "take it out",
        cann_device.inputs_and_outputs_are_computed,
    ),
    Rule(
        "C13", WARNING, "a constant does not fit float16",
        "the default precision mode turns all numbers to float16, and -inf in a mask gives rows of NaN",
        "use -65504 or a smaller magnitude", cann_device.constants_are_finite,
    ),
    Rule(
        "C14", WARNING, "bfloat16", "Atlas A2, A3, 950 and 200I/500 A2 have it, others not", "use float16",
        cann_device.no_bfloat16,
    ),
    Rule(
        "C15", WARNING, "float64, or arithmetic in int64",
        "the device's kernels take neither in general, and its own CPU is slow",
        "use float32 or int32, and int64 for ids, indices and shapes alone", cann_device.no_wide_types,
    ),
    Rule(
        "C16", WARNING, "a cache is written by scattering",
        "in released toolkits ScatterND has a kernel on the device's own CPU alone, and ScatterElements none on 310P",
        "write it by Where with a mask of rows", cann_device.cache_written_by_where,
    ),
    Rule(
        "C17", WARNING, "LayerNormalization",
        "only the parser's development branch has an entry, and the provider's list lacks it; from opset 17 on ONNX "
        "Runtime makes one of its parts", "export such a model at opset 16", cann_parser.no_layer_normalization,
    ),
    Rule(
        "C18", ERROR, "the IR version is too new",
        "onnxruntime-cann 1.24.4 loads up to 13", "write the file with IR version 8", cann_parser.ir_version,
        of_file=True,
    ),
    Rule(
        "C19", WARNING, "indices are an output",
        "the device gives int32 where ONNX promises int64", "choose tokens on the host, from the logits",
        cann_device.indices_stay_inside,
    ),
    Rule(
        "C20", WARNING, "an operand of a shape operator is computed",
        "the toolkit finds the device's kernel for Slice and others when operands are constant; else its CPU runs them",
        FOR_CANN, cann_device.operands_are_constant,
    ),
)  # fmt: skip

CUDA = (
    Rule(
        "U01", ERROR, "an operator has no kernel",
        "it runs on the CPU, with copies around it, and nothing says so", FOR_CUDA, kernel_rules.operator_has_kernel,
    ),
    Rule(
        "U02", ERROR, "no kernel is for this version of an operator",
        "a kernel that was registered for a version on holds for that version alone", "export at a lower opset, or run "
        "another ONNX Runtime", kernel_rules.version_has_kernel,
    ),
    Rule(
        "U03", ERROR, "no kernel is for these types",
        "the node runs on the CPU, with copies around it; GroupQueryAttention, for one, has no float32", FOR_CUDA,
        cuda_kernels.types_have_kernel,
    ),
    Rule(
        "U04", ERROR, "QuantizeLinear or DequantizeLinear of a type without a kernel",
        "there is none for int32 and int16, such as a quantized bias, and up to opset 18 none for float16",
        "keep biases in float", cuda_kernels.quantized_types_have_kernel,
    ),
    Rule(
        "U05", ERROR, "Where, CumSum or Range of a type without a kernel",
        "Where has none for int8 and bool, CumSum none for bfloat16, Range none for float16",
        "cast around it, or compute it on the host", cuda_kernels.narrow_types_have_kernel,
    ),
    Rule(
        "U06", ERROR, "a form that the provider leaves out",
        "it leaves casts to strings, and ArgMax and ArgMin with select_last_index, to the CPU", "rewrite the node",
        cuda_kernels.not_excluded,
    ),
    Rule(
        "U07", WARNING, "an operator of which some forms are left out",
        "the provider takes RNN, GRU, LSTM and ConvTranspose in some forms only", "try it with "
        "session.disable_cpu_ep_fallback at 1", cuda_kernels.partly_supported,
    ),
    Rule(
        "U08", INFO, "arithmetic on shapes is left on the CPU",
        "ONNX Runtime prefers it there: it reads what is in the host's memory anyway", NOTHING,
        cuda_kernels.shapes_on_host,
    ),
    Rule(
        "U09", INFO, "a copy between host and device in each prefill",
        "a kernel reads in one memory what was made in the other; it is once for many tokens", NOTHING,
        cuda_kernels.no_copies,
    ),
    Rule(
        "U10", WARNING, "a copy between host and device in decode",
        "each token waits for it, and a CUDA graph cannot hold it", FOR_CUDA, cuda_kernels.no_copies_in_decode,
    ),
    Rule(
        "U11", WARNING, "decode has shapes that grow",
        "a CUDA graph is recorded for fixed shapes and addresses; sizes chosen with the cache's buffers are fixed",
        FOR_CUDA, cuda_speed.decode_has_fixed_shapes,
    ),
    Rule(
        "U12", WARNING, "decode has control flow",
        "a CUDA graph cannot hold it", "unroll it", cuda_speed.decode_has_no_control_flow,
    ),
    Rule(
        "U13", WARNING, "activations are quantized",
        "the provider has no int8 matmul for these patterns: it rounds, and multiplies in float",
        "choose a precision with float activations, such as a16w8", cuda_speed.activations_in_float,
    ),
    Rule(
        "U14", WARNING, "a weight in few bits is made float in each run",
        "it has not the form that ONNX Runtime turns to MatMulNBits",
        "feed it to one MatMul, straight, with scales for each output or for blocks of its inputs",
        cuda_speed.weights_are_fused,
    ),
    Rule(
        "U15", WARNING, "a cache is read beside its write",
        "past and present are one memory, and the reader may come before or after the write",
        "read what the write gives", cuda_speed.cache_read_after_write,
    ),
    Rule(
        "U16", ERROR, "the IR version is too new",
        "ONNX Runtime 1.24.4 loads up to 13", "write the file with IR version 8 to 13", cuda_kernels.ir_version,
        of_file=True,
    ),
    Rule(
        "U17", INFO, "a type is not known",
        "whether the kernel fits is not verified", NOTHING, kernel_rules.types_are_known,
    ),
    Rule(
        "U18", WARNING, "an operator is of a library",
        "without a kernel for the device it runs on the CPU, with copies around it", "run it with --no-custom-ops "
        "where its library has none", kernel_rules.operator_of_library,
    ),
)  # fmt: skip

CPU = (
    Rule(
        "P01", ERROR, "an operator has no kernel",
        "ONNX Runtime does not open the graph", "export again, or install the ONNX Runtime that made the bundle",
        kernel_rules.operator_has_kernel,
    ),
    Rule(
        "P02", ERROR, "no kernel is for this version of an operator",
        "ONNX Runtime does not open the graph", "install a newer ONNX Runtime, or export at a lower opset",
        kernel_rules.version_has_kernel,
    ),
    Rule(
        "P03", ERROR, "no kernel is for these types",
        "ONNX Runtime does not open the graph", "export with another precision", cpu_rules.types_have_kernel,
    ),
    Rule(
        "P04", WARNING, "float16 without a kernel",
        "ONNX Runtime puts casts around the node and runs it in float32: right, and slow", "export with --target cpu",
        cpu_rules.float16_has_kernel,
    ),
    Rule(
        "P05", INFO, "a type is not known",
        "whether the kernel fits is not verified", NOTHING, kernel_rules.types_are_known,
    ),
    Rule(
        "P06", INFO, "an operator is of a library",
        "satchel has its own; the library of others is named by whoever runs the bundle, with --custom-ops",
        NOTHING, kernel_rules.operator_of_library,
    ),
)  # fmt: skip

RULES: Mapping[str, tuple[Rule, ...]] = {"cann": CANN, "cuda": CUDA, "cpu": CPU}
"""The rules of each provider, by what users call it."""
