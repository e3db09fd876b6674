"""CUDA sources of :mod:`calib.activations.observer_cuda`: each kernel reads activations of many taps once, uncopied.

``{cases}`` is replaced by the switch over a launch's inputs. Arrays of ``int`` describe the taps, one row of fields
each.
"""

#: Each warp of an observing block works independently on 256 channels of some tokens of a row: 8 channels per thread.
OBSERVE_THREADS = 256
WARPS = OBSERVE_THREADS // 32
COLUMN = 256
#: Fields of a tap in ``plan``, for both kernels of activations.
FIELDS = (
    *("warp", "columns", "tokens", "channels", "splits", "per_split", "sums", "token_axis", "channel_axis"),
    *("picked", "pick_stride", "picks", "rows", "count_block", "count_rows", "counted_stride", "counts"),
)
#: Number of bit patterns of one sign; a block counts those of one sign in 16-bit counters, 64 kB.
SIGNED_BINS = 32768
COUNT_THREADS = 1024
COUNT_SHARED = 2 * SIGNED_BINS
#: Largest number of values that a block counts, so that no counter overflows.
MOST_COUNTED = 65535

HEADER = r"""
template <typename T> struct alignas(16) CalibPack { T v[8]; };

template <typename T> __device__ __forceinline__ unsigned calib_pattern(T v) {
  if constexpr (sizeof(T) == 4) return __float_as_uint(static_cast<float>(v)) >> 16;
  else return *reinterpret_cast<const unsigned short*>(&v);
}

// Eight channels of one token, in one or two loads of 16 bytes where contiguous; those beyond ``wanted`` are 0.
template <typename T>
__device__ __forceinline__ CalibPack<T> calib_load(const T* p, long long step, bool whole, int wanted) {
  if (whole && wanted >= 8) return *reinterpret_cast<const CalibPack<T>*>(p);
  CalibPack<T> pack;
#pragma unroll
  for (int i = 0; i < 8; ++i) pack.v[i] = i < wanted ? p[i * step] : static_cast<T>(0.0f);
  return pack;
}

// An asynchronous copy into shared memory, where the GPU supports it.
template <typename T> __device__ __forceinline__ void calib_copy(CalibPack<T>* to, const T* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(CalibPack<T>)); i += 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::
        "r"(static_cast<unsigned>(__cvta_generic_to_shared(reinterpret_cast<char*>(to) + i))),
        "l"(reinterpret_cast<const char*>(from) + i) : "memory");
#else
  *to = *reinterpret_cast<const CalibPack<T>*>(from);
#endif
}
__device__ __forceinline__ void calib_commit() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N> __device__ __forceinline__ void calib_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

struct CalibSums {
  alignas(16) float shift[8], sum[8], square[8], low[8], high[8];
  __device__ __forceinline__ CalibSums(const float (&around)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      shift[i] = around[i];
      sum[i] = square[i] = 0.0f;
      low[i] = __int_as_float(0x7f800000);
      high[i] = -low[i];
    }
  }
  template <typename T> __device__ __forceinline__ void add(const CalibPack<T>& pack) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float value = static_cast<float>(pack.v[i]), d = value - shift[i];
      sum[i] += d;
      square[i] = fmaf(d, d, square[i]);
      low[i] = fminf(low[i], value);
      high[i] = fmaxf(high[i], value);
    }
  }
};
"""

#: Selects the launch's input of a tap, with its strides.
CASE = """
    case {i}:
      x = x{i}, row_step = x{i}_strides[0], token_step = x{i}_strides[f[7]], step = x{i}_strides[f[8]];
      break;"""

_INPUT = r"""
  const int* f = plan + tap * FIELDS;
  const T* x = nullptr;
  long long row_step = 0, token_step = 0, step = 0;
  switch (tap) {{{cases}
  }}
  const int tokens = f[2], channels = f[3], rows = f[12];
  const bool whole = step == 1 && channels % 8 == 0 && row_step % 8 == 0 && token_step % 8 == 0 &&
      reinterpret_cast<unsigned long long>(x) % 16 == 0;
"""

#: sums: shift, Σd, Σd², min, max of every channel for each split of each row; picked: bit patterns of each row.
OBSERVE = (
    r"""
  const int lane = threadIdx.x % 32, warp = blockIdx.x * 8 + threadIdx.x / 32;
  if (warp >= plan[TAPS * FIELDS]) return;
  int tap = 0;
  for (int i = 1; i < TAPS; ++i) if (warp >= plan[i * FIELDS]) tap = i;
"""
    + _INPUT
    + r"""
  const int columns = f[1], local = warp - f[0], column = local % columns, split = local / columns;
  const int row = split / f[4], first = split % f[4] * f[5], last = min(first + f[5], tokens);
  const int channel = column * 256 + lane * 8, wanted = channels - channel;
  const T* base = x + row * row_step + channel * step;
  // Any value near the mean suffices as a shift; the mean of four tokens, as one may be an outlier.
  float shift[8] = {{}};
  for (int u = 0; u < 4; ++u) {{
    const CalibPack<T> pack = calib_load(base + (first + (last - first) * u / 4) * token_step, step, whole, wanted);
#pragma unroll
    for (int i = 0; i < 8; ++i) shift[i] += 0.25f * static_cast<float>(pack.v[i]);
  }}
  CalibSums s(shift);
  if (whole && wanted >= 8) {{
    // Each thread prefetches into a ring buffer of its own: in registers the compiler keeps one load in flight.
    constexpr int RING = sizeof(T) == 4 ? 4 : 8;
    __shared__ CalibPack<T> ring[RING][256];
    for (int token = first; token < first + RING; ++token) {{
      if (token < last) calib_copy(&ring[token - first][threadIdx.x], base + token * token_step);
      calib_commit();
    }}
    const T* ahead = base + (first + RING) * token_step;
    for (int token = first, slot = 0; token < last; ++token, slot = (slot + 1) % RING, ahead += token_step) {{
      calib_wait<RING - 1>();
      s.add(ring[slot][threadIdx.x]);
      if (token + RING < last) calib_copy(&ring[slot][threadIdx.x], ahead);
      calib_commit();
    }}
  }} else {{
    for (int token = first; token < last; ++token)
      s.add(calib_load(base + token * token_step, step, whole, wanted));
  }}
  float* out = sums + f[6] + static_cast<long long>(split) * 5 * channels + channel;
  const float* parts[5] = {{s.shift, s.sum, s.square, s.low, s.high}};
  const bool aligned = channels % 8 == 0 && f[6] % 4 == 0;
#pragma unroll
  for (int k = 0; k < 5; ++k)
    if (aligned && wanted >= 8)
      *reinterpret_cast<CalibPack<float>*>(out + k * channels) = *reinterpret_cast<const CalibPack<float>*>(parts[k]);
    else
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < wanted) out[k * channels + i] = parts[k][i];
  if (split % f[4] == 0)
    for (int j = column * 32 + lane; j < f[11]; j += columns * 32) {{
      const int at = j * f[10];
      const T value = x[row * row_step + at / channels * token_step + at % channels * step];
      picked[f[9] + row * f[11] + j] = static_cast<unsigned short>(calib_pattern(value));
    }}
"""
)

#: Adds to ``counters`` in place, 65,536 per tap: addition commutes, so launches need no order. ``done`` only orders
#: later work after it.
COUNT = (
    r"""
  extern __shared__ unsigned words[];  // two counters each, of the patterns of one sign
  const int tid = threadIdx.x;
  const unsigned sign = blockIdx.x % 2;
  const int block = blockIdx.x / 2;
  int tap = 0;
  for (int i = 1; i < TAPS; ++i) if (block >= plan[i * FIELDS + 13]) tap = i;
"""
    + _INPUT
    + r"""
  const int stride = f[15], all = rows * tokens;
  const int start = static_cast<int>(static_cast<long long>(phase[0]) * min(stride, all) / 65536);
  const int sampled = (all - start + stride - 1) / stride;
  const int first = (block - f[13]) * f[14], last = min(first + f[14], sampled);
  const int packs = (channels + 7) / 8;
  for (int i = tid; i < 16384; i += 1024) words[i] = 0;
  __syncthreads();
  for (int i = tid; i < (last - first) * packs; i += 1024) {{
    const int at = start + (first + i / packs) * stride, channel = i % packs * 8, wanted = channels - channel;
    const T* p = x + at / tokens * row_step + at % tokens * token_step + channel * step;
    const CalibPack<T> pack = calib_load(p, step, whole, wanted);
#pragma unroll
    for (int k = 0; k < 8; ++k) {{
      const unsigned bits = calib_pattern(pack.v[k]);
      if (k < wanted && bits >> 15 == sign) atomicAdd(&words[(bits & 32767) / 2], bits & 1 ? 65536u : 1u);
    }}
  }}
  __syncthreads();
  unsigned* own = const_cast<unsigned*>(counters) + f[16] * 65536 + sign * 32768;
  for (int i = tid; i < 16384; i += 1024) {{
    const unsigned word = words[i];
    if (word & 65535) atomicAdd(&own[2 * i], word & 65535);
    if (word >> 16) atomicAdd(&own[2 * i + 1], word >> 16);
  }}
  if (blockIdx.x == 0 && tid == 0) done[0] = 1;
"""
)

#: One thread per channel adds every split's shifted sums to the double-double sums so far
#: (:class:`.statistics.Moments`). ``taps`` is (taps, 6): first channel, launch, offset in its sums, splits, tokens,
#: tokens of a split.
MERGE = r"""
  const int channel = blockIdx.x * 256 + threadIdx.x;
  if (channel >= CHANNELS) return;
  int tap = 0;
  for (int step = 1 << 14; step > 0; step /= 2)
    if (tap + step < TAPS && channel >= taps[(tap + step) * 6]) tap += step;
  const int* f = taps + tap * 6;
  const int own = channel - f[0], channels = (tap + 1 < TAPS ? taps[(tap + 1) * 6] : CHANNELS) - f[0];
  const float* sums = nullptr;
  switch (f[1]) {{{cases}
  }}
  sums += f[2];
  double total[4];
  for (int k = 0; k < 4; ++k) total[k] = reinterpret_cast<const double*>(moments)[k * CHANNELS + channel];
  float low = ends[channel], high = ends[CHANNELS + channel];
  const int per_row = (f[4] + f[5] - 1) / f[5];
  for (int split = 0; split < f[3]; ++split) {{
    const float* part = sums + static_cast<long long>(split) * 5 * channels + own;
    const int first = split % per_row * f[5];
    const double count = min(f[5], f[4] - first);
    const double shift = part[0], sum = part[channels], square = part[2 * channels];
    low = fminf(low, part[3 * channels]);
    high = fmaxf(high, part[4 * channels]);
    // count · shift and shift · sum are exact: 24 bits by few, 24 by 24.
    const double base = count * shift, tail = fma(base, shift, -(base * shift));
    const double terms[2][4] = {{{{base, sum, 0.0, 0.0}}, {{base * shift, 2.0 * shift * sum, square, tail}}}};
#pragma unroll
    for (int which = 0; which < 2; ++which)
#pragma unroll
      for (int k = 0; k < (which ? 4 : 2); ++k) {{
        const double a = total[2 * which], b = terms[which][k];
        const double s = a + b, share = s - a, error = (a - (s - share)) + (b - share) + total[2 * which + 1];
        total[2 * which] = s + error;
        total[2 * which + 1] = error - (total[2 * which] - s);
      }}
  }}
  for (int k = 0; k < 4; ++k) reinterpret_cast<double*>(new_moments)[k * CHANNELS + channel] = total[k];
  new_ends[channel] = low;
  new_ends[CHANNELS + channel] = high;
"""
MERGE_CASE = """
    case {i}: sums = sums{i}; break;"""

#: One block per row of a tap writes min, max, 1st and 99th percentile to ``ranges`` (rows, 4), one tap after the other.
#: ``taps`` is (taps, 8): first row, launch, offset in ``picked``, picks, offset in ``sums``, splits of a row, channels,
#: and 0 for bfloat16, 1 for float16, 2 for float32.
RANGES_THREADS = 256
RANGES = r"""
  __shared__ unsigned keys[2048];
  __shared__ float low[256], high[256];
  const int tid = threadIdx.x, block = blockIdx.x;
  int tap = 0;
  for (int step = 1 << 14; step > 0; step /= 2)
    if (tap + step < TAPS && block >= taps[(tap + step) * 8]) tap += step;
  const int* f = taps + tap * 8;
  const int row = block - f[0], picks = f[3], channels = f[6];
  const unsigned short* picked = nullptr;
  const float* sums = nullptr;
  switch (f[1]) {{{cases}
  }}
  for (int i = tid; i < 2048; i += 256) {{
    const unsigned bits = i < picks ? picked[f[2] + row * picks + i] : 0u;
    keys[i] = i < picks ? (bits & 32768 ? bits ^ 65535 : bits | 32768) : 65536u;
  }}
  low[tid] = __int_as_float(0x7f800000);
  high[tid] = -low[tid];
  for (int split = row * f[5]; split < (row + 1) * f[5]; ++split) {{
    const float* part = sums + f[4] + static_cast<long long>(split) * 5 * channels;
    for (int i = tid; i < channels; i += 256) {{
      low[tid] = fminf(low[tid], part[3 * channels + i]);
      high[tid] = fmaxf(high[tid], part[4 * channels + i]);
    }}
  }}
  for (int half = 128; half > 0; half /= 2) {{
    __syncthreads();
    if (tid < half) {{
      low[tid] = fminf(low[tid], low[tid + half]);
      high[tid] = fmaxf(high[tid], high[tid + half]);
    }}
  }}
  for (int size = 2; size <= 2048; size *= 2)  // bitonic sort
    for (int gap = size / 2; gap > 0; gap /= 2) {{
      __syncthreads();
      for (int i = tid; i < 1024; i += 256) {{
        const int a = i / gap * 2 * gap + i % gap, b = a + gap;
        const unsigned x = keys[a], y = keys[b];
        if ((x > y) == ((a & size) == 0)) {{
          keys[a] = y;
          keys[b] = x;
        }}
      }}
    }}
  __syncthreads();
  if (tid < 2) {{
    const double place = (tid == 0 ? 0.01 : 0.99) * (picks - 1);
    const int below = static_cast<int>(place);
    double value[2];
    for (int k = 0; k < 2; ++k) {{
      const unsigned key = keys[min(below + k, picks - 1)];
      const unsigned short bits = static_cast<unsigned short>(key & 32768 ? key ^ 32768 : key ^ 65535);
      if (f[7] == 1)
        value[k] = __half2float(*reinterpret_cast<const __half*>(&bits));
      else  // the upper 16 bits of a float32: the midpoint of their bin, or zero
        value[k] = __uint_as_float(static_cast<unsigned>(bits) << 16 | (f[7] == 2 && bits & 32767 ? 32768u : 0u));
    }}
    ranges[block * 4 + 2 + tid] = static_cast<float>(value[0] + (value[1] - value[0]) * (place - below));
    ranges[block * 4 + tid] = tid == 0 ? low[0] : high[0];
  }}
"""
RANGES_CASE = """
    case {i}: picked = picked{i}; sums = sums{i}; break;"""
