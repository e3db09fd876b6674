"""CUDA sources of :mod:`calib.activations.cuda`: each reads an activation once, as it lies, a few taps a launch.

``{cases}`` is filled with the choice among a launch's inputs. Arrays of ``int`` describe the taps, a row of fields
each.
"""

#: Threads of a block: 8 warps share 256 channels, 8 of them a thread, and take tokens in turn.
OBSERVE_THREADS = 256
#: Channels of such a block.
COLUMN = 256
#: Fields of a tap in ``plan``, for both kernels of activations.
FIELDS = (
    *("block", "columns", "tokens", "channels", "splits", "per_split", "sums", "ends"),
    *("picked", "pick_stride", "picks", "rows", "count_block", "count_rows", "counted_stride"),
)
#: Bit patterns of one sign; a block counts those of one sign, in 16-bit counters: 64 kB.
SIGNED_BINS = 32768
COUNT_THREADS = 1024
COUNT_SHARED = 2 * SIGNED_BINS
#: So many values at most are counted by a block, or a counter could overflow.
MOST_COUNTED = 65535

HEADER = r"""
template <typename T> struct alignas(16) CalibPack { T v[8]; };

template <typename T> __device__ __forceinline__ unsigned calib_pattern(T v) {
  if constexpr (sizeof(T) == 4) return __float_as_uint(static_cast<float>(v)) >> 16;
  else return *reinterpret_cast<const unsigned short*>(&v);
}

// Eight channels of one token, as one or two loads of 16 bytes where they lie so; what is beyond ``wanted`` is 0.
template <typename T>
__device__ __forceinline__ CalibPack<T> calib_load(const T* p, long long step, bool whole, int wanted) {
  if (whole) return *reinterpret_cast<const CalibPack<T>*>(p);
  CalibPack<T> pack;
  for (int i = 0; i < 8; ++i) pack.v[i] = i < wanted ? p[i * step] : static_cast<T>(0.0f);
  return pack;
}
"""

#: Which of the launch's inputs a tap is, with its strides.
CASE = """
    case {i}: x = x{i}; row_step = x{i}_strides[0]; token_step = x{i}_strides[1]; step = x{i}_strides[2]; break;"""

_INPUT = r"""
  const T* x = nullptr;
  long long row_step = 0, token_step = 0, step = 0;
  switch (tap) {{{cases}
  }}
  const int tokens = f[2], channels = f[3], rows = f[11];
  const bool whole = step == 1 && channels % 8 == 0 && row_step % 8 == 0 && token_step % 8 == 0 &&
      reinterpret_cast<unsigned long long>(x) % 16 == 0;
"""

#: sums: of each split of each row shift, Σd, Σd², min, max of every channel; ends: min, max of each split's column;
#: picked: bit patterns of each row.
OBSERVE = (
    r"""
  __shared__ float shared[5][8][256];
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  int tap = 0;
  for (int i = 1; i < TAPS; ++i) if (static_cast<int>(blockIdx.x) >= plan[i * FIELDS]) tap = i;
  const int* f = plan + tap * FIELDS;
"""
    + _INPUT
    + r"""
  const int columns = f[1], local = blockIdx.x - f[0], column = local % columns, split = local / columns;
  const int row = split / f[4], first = split % f[4] * f[5], last = min(first + f[5], tokens);
  const int channel = column * 256 + lane * 8, wanted = channels - channel;
  const T* base = x + row * row_step + channel * step;

  // Any value near the mean will do as a shift; four tokens of the split, as one may be an outlier.
  float shift[8], sum[8], square[8], low[8], high[8];
  for (int i = 0; i < 8; ++i) {{
    shift[i] = sum[i] = square[i] = 0.0f;
    low[i] = __int_as_float(0x7f800000);
    high[i] = -low[i];
  }}
  for (int k = 1; k < 8; k += 2) {{
    const T* token = base + (first + (last - first) * k / 8) * token_step;
    const CalibPack<T> pack = calib_load(token, step, whole && wanted > 0, wanted);
    for (int i = 0; i < 8; ++i) shift[i] += 0.25f * static_cast<float>(pack.v[i]);
  }}
  for (int token = first + warp; token < last; token += 32) {{
    CalibPack<T> pack[4];
    for (int u = 0; u < 4; ++u)
      if (token + 8 * u < last)
        pack[u] = calib_load(base + (token + 8 * u) * token_step, step, whole && wanted > 0, wanted);
    for (int u = 0; u < 4; ++u)
      if (token + 8 * u < last)
        for (int i = 0; i < 8; ++i) {{
          const float value = static_cast<float>(pack[u].v[i]), d = value - shift[i];
          sum[i] += d;
          square[i] = fmaf(d, d, square[i]);
          low[i] = fminf(low[i], value);
          high[i] = fmaxf(high[i], value);
        }}
  }}
  for (int i = 0; i < 8; ++i) {{
    const int place = i * 32 + lane;
    shared[0][warp][place] = shift[i];
    shared[1][warp][place] = sum[i];
    shared[2][warp][place] = square[i];
    shared[3][warp][place] = low[i];
    shared[4][warp][place] = high[i];
  }}
  __syncthreads();
  const int place = tid % 8 * 32 + tid / 8, own = column * 256 + tid;
  float total[5] = {{shared[0][0][place], 0.0f, 0.0f, shared[3][0][place], shared[4][0][place]}};
  for (int w = 0; w < 8; ++w) {{
    total[1] += shared[1][w][place];
    total[2] += shared[2][w][place];
    total[3] = fminf(total[3], shared[3][w][place]);
    total[4] = fmaxf(total[4], shared[4][w][place]);
  }}
  if (own < channels)
    for (int k = 0; k < 5; ++k) sums[f[6] + (split * 5 + k) * channels + own] = total[k];
  else {{
    total[3] = __int_as_float(0x7f800000);
    total[4] = -total[3];
  }}
  __syncthreads();
  shared[0][0][tid] = total[3];
  shared[1][0][tid] = total[4];
  for (int half = 128; half > 0; half /= 2) {{
    __syncthreads();
    if (tid < half) {{
      shared[0][0][tid] = fminf(shared[0][0][tid], shared[0][0][tid + half]);
      shared[1][0][tid] = fmaxf(shared[1][0][tid], shared[1][0][tid + half]);
    }}
  }}
  __syncthreads();
  if (tid < 2) ends[f[7] + 2 * local + tid] = shared[tid][0][0];
  if (split % f[4] == 0)
    for (int j = column * 256 + tid; j < f[10]; j += columns * 256) {{
      const int at = j * f[9];
      const T value = x[row * row_step + at / channels * token_step + at % channels * step];
      picked[f[8] + row * f[10] + j] = static_cast<unsigned short>(calib_pattern(value));
    }}
"""
)

#: counts: of each tap 65,536 counters of bit patterns, zero before.
COUNT = (
    r"""
  extern __shared__ unsigned words[];  // two counters each, of the patterns of one sign
  const int tid = threadIdx.x;
  const unsigned sign = blockIdx.x % 2;
  const int block = blockIdx.x / 2;
  int tap = 0;
  for (int i = 1; i < TAPS; ++i) if (block >= plan[i * FIELDS + 12]) tap = i;
  const int* f = plan + tap * FIELDS;
"""
    + _INPUT
    + r"""
  const int stride = f[14], all = rows * tokens;
  const int start = static_cast<int>(static_cast<long long>(phase[0]) * min(stride, all) / 65536);
  const int sampled = (all - start + stride - 1) / stride;
  const int first = (block - f[12]) * f[13], last = min(first + f[13], sampled);
  const int packs = (channels + 7) / 8;
  for (int i = tid; i < 16384; i += 1024) words[i] = 0;
  __syncthreads();
  for (int i = tid; i < (last - first) * packs; i += 1024) {{
    const int at = start + (first + i / packs) * stride, channel = i % packs * 8, wanted = channels - channel;
    const T* p = x + at / tokens * row_step + at % tokens * token_step + channel * step;
    const CalibPack<T> pack = calib_load(p, step, whole, wanted);
    for (int k = 0; k < 8; ++k) {{
      const unsigned bits = calib_pattern(pack.v[k]);
      if (k < wanted && bits >> 15 == sign) atomicAdd(&words[(bits & 32767) / 2], bits & 1 ? 65536u : 1u);
    }}
  }}
  __syncthreads();
  unsigned* own = counts + tap * 65536 + sign * 32768;
  for (int i = tid; i < 16384; i += 1024) {{
    const unsigned word = words[i];
    if (word & 65535) atomicAdd(&own[2 * i], word & 65535);
    if (word >> 16) atomicAdd(&own[2 * i + 1], word >> 16);
  }}
"""
)

#: A thread a channel: adds every split's shifted sums to the doubled sums so far (:class:`.statistics.Moments`).
#: ``taps`` is (taps, 6): first channel, launch, place in its sums, splits, tokens, tokens of a split.
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
    for (int which = 0; which < 2; ++which)
      for (int k = 0; k < 4; ++k) {{
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

#: A block a row of a tap: its min, max, 1st and 99th percentile into ``ranges`` (rows, 4), taps one after the other.
#: ``taps`` is (taps, 7): first row, launch, place in ``picked``, picks, place in ``ends``, pairs of a row, and 0 for
#: bfloat16, 1 for float16, 2 for float32.
RANGES_THREADS = 256
RANGES = r"""
  __shared__ unsigned keys[2048];
  __shared__ float low[256], high[256];
  const int tid = threadIdx.x, block = blockIdx.x;
  int tap = 0;
  for (int step = 1 << 14; step > 0; step /= 2)
    if (tap + step < TAPS && block >= taps[(tap + step) * 7]) tap += step;
  const int* f = taps + tap * 7;
  const int row = block - f[0], picks = f[3], pairs = f[5];
  const unsigned short* picked = nullptr;
  const float* ends = nullptr;
  switch (f[1]) {{{cases}
  }}
  for (int i = tid; i < 2048; i += 256) {{
    const unsigned bits = i < picks ? picked[f[2] + row * picks + i] : 0u;
    keys[i] = i < picks ? (bits & 32768 ? bits ^ 65535 : bits | 32768) : 65536u;
  }}
  low[tid] = __int_as_float(0x7f800000);
  high[tid] = -low[tid];
  for (int i = tid; i < pairs; i += 256) {{
    low[tid] = fminf(low[tid], ends[f[4] + (row * pairs + i) * 2]);
    high[tid] = fmaxf(high[tid], ends[f[4] + (row * pairs + i) * 2 + 1]);
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
      if (f[6] == 1)
        value[k] = __half2float(*reinterpret_cast<const __half*>(&bits));
      else  // of a float32 the upper half is known: the middle of what it may be, or zero
        value[k] = __uint_as_float(static_cast<unsigned>(bits) << 16 | (f[6] == 2 && bits & 32767 ? 32768u : 0u));
    }}
    ranges[block * 4 + 2 + tid] = static_cast<float>(value[0] + (value[1] - value[0]) * (place - below));
    ranges[block * 4 + tid] = tid == 0 ? low[0] : high[0];
  }}
"""
RANGES_CASE = """
    case {i}: picked = picked{i}; ends = ends{i}; break;"""
