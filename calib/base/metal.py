"""What MLX can run on Metal: the kernels of its library, and which of them an operation starts.

MLX compiles most kernels ahead, into ``mlx.metallib``, each under a name that says what it does and for which types;
an operation looks its kernel up by name and fails where there is none. The names of the tested version are kept in
``metal_kernels.txt``; a Mac's own library is read instead where there is one. Kernels that MLX compiles when they are
needed (gathers and scatters) have no name there, and limits of their own.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

STORED = Path(__file__).with_name("metal_kernels.txt")

_TYPE = r"(?:bool_|u?int\d+|complex64|b?float16_t|b?float16|float32|float)"
#: Names that :func:`needed` gives, less what follows in the library's: sizes of tiles and heads, which MLX chooses.
_NAME = re.compile(
    rf"(?:vv?_[A-Z]\w+|v_copy\w+|rbitsc"
    rf"|(?:arange|arg(?:min|max)_|all_reduce_[a-z]+|block_[a-z]+_(?:precise_)?|gemv_|implicit_gemm_conv_2d_){_TYPE}"
    rf"|(?:layer_norm|rms|rope_|sdpa_vector_|steel_attention_){_TYPE}"
    rf"|(?:c(?:arg)?_block_sort_|contig_scan_inclusive_[a-z]+_|steel_gemm_fused_nn_){_TYPE}_{_TYPE}"
    rf"|(?:affine|mxfp4|mxfp8|nvfp4)_(?:quantize|dequantize|qmm_n|qmm_t)_{_TYPE}_gs_\d+_b_\d)(?=_|$)"
)

#: Operations that move values or only look at them otherwise: a copy is all that they may need.
MOVES = frozenset(
    [
        *("AsStrided", "Broadcast", "BroadcastAxes", "Concatenate", "Contiguous", "Copy", "CustomTransforms"),
        *("Depends", "DynamicSlice", "DynamicSliceUpdate", "ExpandDims", "Flatten", "Full", "Gather", "GatherAxis"),
        *("NumberOfElements", "Pad", "Reshape", "Scatter", "ScatterAxis", "Slice", "SliceUpdate", "Split", "Squeeze"),
        *("StopGradient", "Transpose", "Unflatten", "View"),
    ]
)
#: Those that take arrays of indices, and how many inputs they have besides. MLX compiles their kernels when needed.
INDEXED = {"Gather": 1, "Scatter": 2}
MOST_INDICES = 20
#: Atomic operations of Metal have 32 bits.
ATOMIC, EIGHT_BYTES = frozenset({"Scatter", "ScatterAxis"}), frozenset({"int64", "uint64", "complex64"})

# The orders of MLX's enumerations, by which operations give their kinds.
BITWISE = ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "LeftShift", "RightShift")
LOGARITHMS = ("Log2", "Log10", "Log")
REDUCTIONS = ("and", "or", "sum", "prod", "min", "max")
SCANS = ("max", "min", "sum", "prod", "logaddexp")
QUANTIZED = ("affine", "mxfp4", "mxfp8", "nvfp4")

#: Types in the names of kernels that are templates of them.
C_TYPES = {"float32": "float", "float16": "float16_t", "bfloat16": "bfloat16_t"}

#: Operations whose kernel depends on their arguments, and on how many of them, in MLX's order.
DECIDING = {
    **dict.fromkeys(("ArgReduce", "BitwiseBinary", "Equal", "Log", "Reduce", "Scan", "Softmax", "Sqrt"), 1),
    **dict.fromkeys(("Quantize", "QuantizedMatmul"), 4),
}


class Operation(NamedTuple):
    """One kind of node in MLX's graphs.

    Attributes:
        name: MLX's primitive.
        inputs, outputs: names of types, such as 'float32' and 'bool_'.
        arguments: those that decide the kernel, see :data:`DECIDING`.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: tuple[Any, ...] = ()

    def __str__(self) -> str:
        arguments = f" {list(self.arguments)}" if self.arguments else ""
        return f"{self.name}{arguments} of {', '.join(dict.fromkeys(self.inputs or self.outputs))}"


def lacking(operation: Operation, kernels: frozenset[str]) -> str:
    """Why Metal cannot run an operation; empty where it can."""
    types = {*operation.inputs, *operation.outputs}
    if "float64" in types:
        return "float64 is not supported on the GPU"
    if operation.name in ATOMIC and operation.outputs[0] in EIGHT_BYTES:
        return "a GPU scatter takes no 64-bit values"
    if len(operation.inputs) - INDEXED.get(operation.name, len(operation.inputs)) > MOST_INDICES:
        return f"more than {MOST_INDICES} arrays of indices"
    missing = [name for name in needed(operation) if name not in kernels]
    return f"no kernel {missing[0]} is known" if missing else ""


def needed(operation: Operation) -> Iterator[str]:
    """Yield names of the kernels that an operation may start, one for each family of tiles and strides.

    An operation that is not named here is taken for one that works value by value: ``v_NameInOut`` with one input.
    """
    name, a = operation.name, operation.arguments
    i, o = (operation.inputs or operation.outputs)[0], operation.outputs[0]
    match name:
        case _ if name in MOVES:
            yield from (f"v_copy{t}{t}" for t in {*operation.inputs, *operation.outputs})
        case "Round" if "int" in i:  # as it is
            yield f"v_copy{i}{o}"
        case "AsType":
            yield f"v_copy{i}{o}"
        case "Arange":
            yield f"arange{o}"
        case "ArgReduce":
            yield f"{('argmin', 'argmax')[a[0]]}_{i}"
        case "Reduce":
            yield _reduction(REDUCTIONS[a[0]], i)
        case "Scan":
            yield f"contig_scan_inclusive_{SCANS[a[0]]}_{i}_{o}"
        case "Sort" | "Partition":
            yield f"c_block_sort_{i}_{i}"
        case "ArgSort" | "ArgPartition":
            yield f"carg_block_sort_{i}_{o}"
        case "Softmax":
            yield f"block_softmax_{'precise_' if a[0] and i != 'float32' else ''}{i}"
        case "LogSumExp":
            yield f"block_logsumexp_{i}"
        case "RandomBits":
            yield "rbitsc"
        case "Matmul" | "AddMM":
            yield from (f"steel_gemm_fused_nn_{i}_{o}", f"gemv_{o}")
        case "Convolution":
            yield f"implicit_gemm_conv_2d_{i}"
        case "Quantize" | "QuantizedMatmul":
            yield _quantized(operation)
        case "LayerNorm" | "RMSNorm" | "RoPE":
            yield {"LayerNorm": "layer_norm", "RMSNorm": "rms", "RoPE": "rope_"}[name] + i
        case "ScaledDotProductAttention":
            yield from (f"steel_attention_{i}", f"sdpa_vector_{C_TYPES.get(i, i)}")
        case "Select":
            yield f"v_Select{o}"
        case _:
            kind = _kind(operation)
            yield f"v_{kind}{i}{o}" if len(operation.inputs) < 2 else f"vv_{kind}{i}"


def _kind(operation: Operation) -> str:
    """The name by which kernels call an operation on single values."""
    match operation.name, operation.arguments:
        case "BitwiseBinary", (which,):
            return BITWISE[which]
        case "Log", (base,):
            return LOGARITHMS[base]
        case "Sqrt", (True,):
            return "Rsqrt"
        case "Equal", (True,):
            return "NaNEqual"
    return operation.name


def _reduction(what: str, dtype: str) -> str:
    """The kernel of a reduction; whole numbers share kernels, those of truth values are found by ``and`` and ``or``."""
    if dtype == "bool_":
        what = {"prod": "and", "min": "and", "max": "or"}.get(what, what)
    if what == "sum" or (what == "prod" and "int" in dtype):
        dtype = "int8" if dtype == "bool_" else dtype.removeprefix("u")
    return f"all_reduce_{what}{dtype}"


def _quantized(operation: Operation) -> str:
    """The kernel of a rounding, its inverse, or a product with packed weights."""
    group_size, bits, mode, flag = operation.arguments[:4]
    work = (("qmm_n", "qmm_t") if operation.name == "QuantizedMatmul" else ("quantize", "dequantize"))[bool(flag)]
    floating = operation.outputs[0] if work == "dequantize" else operation.inputs[0]
    return f"{QUANTIZED[mode]}_{work}_{C_TYPES.get(floating, floating)}_gs_{group_size}_b_{bits}"


def shortened(names: Iterable[str]) -> frozenset[str]:
    """Those of the library's ``names`` that operations are looked up by, in the form of :func:`needed`."""
    return frozenset(found[0] for name in names if (found := _NAME.match(name)))


def names_in(library: Path) -> list[str]:
    """Names of all kernels in a Metal library.

    Its header gives offset and size of the list of functions, each of which has its name after the tag NAME.
    """
    with library.open("rb") as file:
        header = file.read(40)
        offset, size = struct.unpack_from("<QQ", header, 24)
        file.seek(offset)
        return [name.decode() for name in re.findall(rb"NAME..(\w+)\0", file.read(size), re.DOTALL)]


def stored() -> tuple[str, frozenset[str]]:
    """Version of MLX whose kernels are kept here, and their names."""
    first, *lines = STORED.read_text(encoding="utf-8").splitlines()
    return first.split()[-1], frozenset(name for line in lines for name in line.split())


def kernels() -> frozenset[str]:
    """Kernels of the MLX that is installed where it has a library of them all, as on a Mac; else those kept here."""
    import mlx.core as mx

    library = Path(mx.__file__).parent / "lib" / "mlx.metallib"
    own = shortened(names_in(library)) if library.is_file() else frozenset()
    return own if "vv_Addfloat32" in own else stored()[1]  # an MLX that compiles every kernel when it is needed has few
