"""Runs calib's CUDA kernels on a CPU: their sources compiled by g++, a coroutine a CUDA thread, resumed at barriers.

Slow, and blind to what only a GPU has (alignment faults, races, occupancy), but the arithmetic and the indexing are the
very sources that a GPU runs.
"""

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

COMPILER = shutil.which("g++")

#: Without C++'s own headers, which would take longer to compile than all that is compiled.
PRELUDE = r"""
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
template <class T> static T min(T a, T b) { return b < a ? b : a; }
template <class T> static T max(T a, T b) { return a < b ? b : a; }
struct Index { unsigned x; };
static Index threadIdx, blockIdx;
static ucontext_t scheduler_, threads_[1024];
static bool ended_[1024];
static void __syncthreads() { swapcontext(&threads_[threadIdx.x], &scheduler_); }
#define __device__
#define __forceinline__ inline
#define __shared__ static
static unsigned __float_as_uint(float v) { unsigned u; memcpy(&u, &v, 4); return u; }
static float __uint_as_float(unsigned u) { float v; memcpy(&v, &u, 4); return v; }
static float __int_as_float(int u) { float v; memcpy(&v, &u, 4); return v; }
struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float v) : bits(__float_as_uint(v) >> 16) {}
  operator float() const { return __uint_as_float(unsigned(bits) << 16); }
};
typedef _Float16 __half;
static float __half2float(__half v) { return v; }
static unsigned atomicAdd(unsigned* p, unsigned v) { return (*p += v) - v; }
"""

TYPES = {
    mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.uint32: "unsigned",
    mx.int32: "int", mx.uint16: "unsigned short", mx.uint64: "uint64_t",
}  # fmt: skip
NUMPY = {mx.float32: np.float32, mx.uint32: np.uint32, mx.uint16: np.uint16, mx.uint64: np.uint64}


def host_array(x: mx.array) -> np.ndarray:
    """The array's own memory, with its strides; 16-bit floats as their bits."""
    mx.eval(x)
    return np.asarray(x.view(mx.uint16) if x.dtype.size == 2 else x)


class Emulator:
    """Stands in for ``mx.fast.cuda_kernel``; compiles into ``folder``."""

    def __init__(self, folder: Path):
        self.folder, self.launches = folder, 0

    def __call__(
        self,
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        shared_memory: int = 0,
    ) -> Any:
        def launch(
            inputs: Sequence[mx.array],
            template: Sequence[tuple[str, Any]],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            output_shapes: Sequence[tuple[int, ...]],
            output_dtypes: Sequence[mx.Dtype],
            init_value: float | None = None,
        ) -> list[mx.array]:
            self.launches += 1
            assert grid[0] % threadgroup[0] == 0
            values = [f"using {n} = {TYPES[v]};" if isinstance(v, mx.Dtype) else f"constexpr int {n} = {v};"
                      for n, v in template]  # fmt: skip
            kinds = [TYPES[x.dtype] for x in inputs], [TYPES[dtype] for dtype in output_dtypes]
            library = self._compiled(header, source, values, input_names, output_names, kinds, shared_memory)
            hosts = [host_array(x) for x in inputs]
            outputs = [np.empty(shape, NUMPY[dtype]) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
            for output in outputs:
                # What a kernel leaves unwritten must show.
                output.view(np.uint8).fill(0xFF if init_value is None else 0)
                assert init_value in (None, 0)
            strides = [(ctypes.c_int64 * 8)(*(s // x.itemsize for s in x.strides)) for x in hosts]
            pointers = [x.ctypes.data for x in (*hosts, *outputs)]
            library.launch(
                (ctypes.c_void_p * len(pointers))(*pointers),
                (ctypes.c_void_p * len(strides))(*(ctypes.addressof(s) for s in strides)),
                grid[0] // threadgroup[0],
                threadgroup[0],
            )
            return [mx.array(output) for output in outputs]

        return launch

    def _compiled(
        self,
        header: str,
        source: str,
        values: Sequence[str],
        inputs: Sequence[str],
        outputs: Sequence[str],
        kinds: tuple[list[str], list[str]],
        shared: int,
    ) -> ctypes.CDLL:
        declared = [f"const {kind}* {n} = (const {kind}*)pointers[{i}];"
                    for i, (n, kind) in enumerate(zip(inputs, kinds[0], strict=True))]  # fmt: skip
        declared += [f"const int64_t* {n}_strides = (const int64_t*)strides[{i}];" for i, n in enumerate(inputs)]
        declared += [f"{kind}* {n} = ({kind}*)pointers[{len(inputs) + i}];"
                     for i, (n, kind) in enumerate(zip(outputs, kinds[1], strict=True))]  # fmt: skip
        text = f"""{PRELUDE}
alignas(16) static unsigned words_[{max(shared // 4, 1)}];
{header}
static void kernel(void** pointers, void** strides) {{
  {" ".join(values)}
  {" ".join(declared)}
  {source.replace("extern __shared__ unsigned words[];", "unsigned* words = words_;")}
}}
static void** pointers_;
static void** strides_;
static void thread() {{
  kernel(pointers_, strides_);
  ended_[threadIdx.x] = true;
}}
extern "C" void launch(void** pointers, void** strides, unsigned blocks, unsigned threads) {{
  pointers_ = pointers, strides_ = strides;
  static char stacks[1024 * 32768];
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {{
    for (unsigned t = 0; t < threads; ++t) {{
      ended_[t] = false;
      getcontext(&threads_[t]);
      threads_[t].uc_stack.ss_sp = &stacks[t * 32768];
      threads_[t].uc_stack.ss_size = 32768;
      threads_[t].uc_link = &scheduler_;
      makecontext(&threads_[t], thread, 0);
    }}
    // Each goes on to its next barrier before any passes it.
    for (unsigned left = threads; left > 0;)
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
        if (!ended_[threadIdx.x]) {{
          swapcontext(&scheduler_, &threads_[threadIdx.x]);
          left -= ended_[threadIdx.x];
        }}
  }}
}}
"""
        stem = self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not stem.with_suffix(".so").exists():
            stem.with_suffix(".cpp").write_text(text)
            command = [str(COMPILER), "-std=c++20", "-O1", "-w", "-shared", "-fPIC"]
            files = [str(stem.with_suffix(".cpp")), "-o", str(stem.with_suffix(".so"))]
            subprocess.run([*command, *files], check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(stem.with_suffix(".so")))
