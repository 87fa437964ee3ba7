// SPDX-License-Identifier: Apache-2.0
// Products of at most eight rows with weights of four bits, in CUDA C++, where codes become
// operands of the tensor cores without leaving registers. No header, so that NVRTC and nvcc both
// take it.
//
// The order of the columns within a product is free, as long as both operands have the same. So a
// thread takes the words of codes as they are stored, 128 bits of two rows at once, and the order
// in which logical operations free the nibbles of a word decides which columns an operand holds;
// the few activations are put into that order instead. The columns are shared among the warps of a
// block, whose sums are added in the order of the warps.

#ifndef COFIRE_EMULATED  // a test has a model of these, to run the rest without a GPU

// (a & b) | c in one operation
__device__ __forceinline__ unsigned and_or(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// byte i is the one of the eight bytes of b:a that nibble i of the selector names
__device__ __forceinline__ unsigned permute(unsigned a, unsigned b, unsigned selector) {
  unsigned d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

__device__ __forceinline__ unsigned fma_f16x2(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ unsigned fma_bf16x2(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

__device__ __forceinline__ void multiply_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                             unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                              unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_s8(int (&c)[4], const unsigned (&a)[4], unsigned b0,
                                            unsigned b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ unsigned short to_f16(float x) {
  unsigned short y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ unsigned short to_bf16(float x) {
  unsigned short y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

#endif

// How the eight codes of a word become operands: of each row `kHalves` pairs of registers, and the
// activations of the same columns in the same order.

// Half precision: 1024 + q is 0x6400 | q, and 1024 + 16 q is 0x6400 | 16 q. Operands hold q - 8.
struct Half {
  using Sum = float;
  using Output = unsigned short;
  static constexpr int kHalves = 2, kCentre = 8, kBytes = 2;
  static constexpr unsigned kOnes = 0x3c003c00;

  __device__ __forceinline__ void operands(unsigned word, unsigned (&pairs)[4]) const {
    const unsigned minus_1032 = 0xe408e408, sixteenth = 0x2c002c00, minus_72 = 0xd480d480;
    const unsigned upper = word >> 8;
    pairs[0] = fma_f16x2(and_or(word, 0x000f000f, 0x64006400), kOnes, minus_1032);
    pairs[1] = fma_f16x2(and_or(word, 0x00f000f0, 0x64006400), sixteenth, minus_72);
    pairs[2] = fma_f16x2(and_or(upper, 0x000f000f, 0x64006400), kOnes, minus_1032);
    pairs[3] = fma_f16x2(and_or(upper, 0x00f000f0, 0x64006400), sixteenth, minus_72);
  }
  static __device__ __forceinline__ void arrange(const unsigned (&x)[4], unsigned (&pairs)[4]) {
    pairs[0] = permute(x[0], x[2], 0x5410);
    pairs[1] = permute(x[0], x[2], 0x7632);
    pairs[2] = permute(x[1], x[3], 0x5410);
    pairs[3] = permute(x[1], x[3], 0x7632);
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4],
                                                  unsigned b0, unsigned b1) {
    multiply_f16(c, a, b0, b1);
  }
  static __device__ __forceinline__ Output output(float y) { return to_f16(y); }
  static __device__ __forceinline__ float bias(const Output* p, long long n) {
    const unsigned bits = p[n];  // exact: the exponent moves by 2^112, which also covers subnormals
    const unsigned magnitude = (bits & 0x7fff) << 13, sign = (bits & 0x8000) << 16;
    const float scaled = __uint_as_float(magnitude) * 5.192296858534828e33f;
    const float value = magnitude >= 0x0f800000 ? __uint_as_float(magnitude | 0x7f800000) : scaled;
    return sign ? -value : value;
  }
};

// bfloat16 has seven bits of mantissa: 128 + q is 0x4300 | q.
struct Brain : Half {
  static constexpr unsigned kOnes = 0x3f803f80;

  __device__ __forceinline__ void operands(unsigned word, unsigned (&pairs)[4]) const {
    const unsigned minus_136 = 0xc308c308;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      pairs[i] = fma_bf16x2(and_or(word >> (4 * i), 0x000f000f, 0x43004300), kOnes, minus_136);
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4],
                                                  unsigned b0, unsigned b1) {
    multiply_bf16(c, a, b0, b1);
  }
  static __device__ __forceinline__ Output output(float y) { return to_bf16(y); }
  static __device__ __forceinline__ float bias(const Output* p, long long n) {
    return __uint_as_float(static_cast<unsigned>(p[n]) << 16);
  }
};

// Bytes: four even and four odd nibbles.
struct Byte {
  using Sum = int;
  using Output = float;
  static constexpr int kHalves = 1, kCentre = 0, kBytes = 1;
  static constexpr unsigned kOnes = 0x01010101;

  __device__ __forceinline__ void operands(unsigned word, unsigned (&pairs)[2]) const {
    pairs[0] = word & 0x0f0f0f0f;
    pairs[1] = (word >> 4) & 0x0f0f0f0f;
  }
  static __device__ __forceinline__ void arrange(const unsigned (&x)[2], unsigned (&pairs)[2]) {
    pairs[0] = permute(x[0], x[1], 0x6420);
    pairs[1] = permute(x[0], x[1], 0x7531);
  }
  static __device__ __forceinline__ void multiply(int (&c)[4], const unsigned (&a)[4], unsigned b0,
                                                  unsigned b1) {
    multiply_s8(c, a, b0, b1);
  }
  static __device__ __forceinline__ Output output(float y) { return y; }
  static __device__ __forceinline__ float bias(const Output* p, long long n) { return p[n]; }
};

// Bytes from a table of 16 in four registers: a permutation looks up the lower three bits of four
// codes in each half of the table, a third one takes the half that the highest bit says.
struct Table : Byte {
  unsigned table[4];

  __device__ __forceinline__ unsigned look_up(unsigned codes) const {
    const unsigned lower = codes & 0x7777;
    const unsigned which = and_or(codes >> 1, 0x4444, 0x3210);
    return permute(permute(table[0], table[1], lower), permute(table[2], table[3], lower), which);
  }
  __device__ __forceinline__ void operands(unsigned word, unsigned (&pairs)[2]) const {
    pairs[0] = look_up(word);
    pairs[1] = look_up(word >> 16);
  }
  static __device__ __forceinline__ void arrange(const unsigned (&x)[2], unsigned (&pairs)[2]) {
    pairs[0] = x[0];
    pairs[1] = x[1];
  }
};

template <int kCount>
__device__ __forceinline__ void load_words(const unsigned* from, unsigned (&to)[kCount]) {
  if constexpr (kCount % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(from)[i];
      to[4 * i] = v.x, to[4 * i + 1] = v.y, to[4 * i + 2] = v.z, to[4 * i + 3] = v.w;
    }
  } else if constexpr (kCount == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    to[0] = v.x, to[1] = v.y;
  } else {
    to[0] = *from;
  }
}

constexpr int kWarps = 8, kTiles = 2, kRows = 16 * kTiles;  // rows of the weight per block

// What a thread loads of one step of 32 kWords columns: kWords words of two rows of each tile, and
// the activations of the same columns.
template <class Kind, int kWords>
struct Step {
  static constexpr int kInputs = 2 * Kind::kBytes * kWords;
  unsigned codes[kTiles][2][kWords];
  unsigned x[kInputs];

  // codes_of and input: the thread's first words
  __device__ __forceinline__ void load(const unsigned* codes_of, const int (&row)[kTiles][2],
                                       long long row_words, const unsigned* input, bool present,
                                       int step) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        load_words(codes_of + row[tile][half] * row_words + step * (4 * kWords), codes[tile][half]);
    if (present) {
      load_words(input + step * (4 * kInputs), x);
    } else {
#pragma unroll
      for (int i = 0; i < kInputs; ++i) x[i] = 0;
    }
  }
};

// y[m, n] = a[m] sum over groups of scale (sum q x - zero sum x) + offset sum x, + bias[n]. The
// group is a multiple of 32 kWords columns, or the row. scale, zero, offset, a and bias may be
// null.
template <class Kind, int kWords>
__device__ __forceinline__ void few_rows(const Kind& kind, const unsigned* input,
                                         const unsigned* codes, const float* scale,
                                         const float* zero, const float* offset,
                                         const typename Kind::Output* bias, const float* a,
                                         typename Kind::Output* y, long long samples,
                                         long long rows, long long columns, long long group,
                                         long long zero_row, long long zero_group) {
  using Sum = typename Kind::Sum;
  constexpr int kPairs = 2 * Kind::kHalves;
  __shared__ float parts[kWarps][kRows][8];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const long long first_row = blockIdx.x * static_cast<long long>(kRows), row_words = columns / 8;
  const int steps = static_cast<int>(columns / (32 * kWords)),
            groups = static_cast<int>(columns / group);
  const int in_group = steps / groups;

  int row[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const long long r = first_row + 16 * tile + 8 * half + g;
      row[tile][half] = static_cast<int>(r < rows ? r : rows - 1);  // read in vain, never written
    }
  codes += t * kWords;
  input += (g < samples ? g : 0) * (columns * Kind::kBytes / 4) + t * Step<Kind, kWords>::kInputs;
  const bool present = g < samples;

  float found[kTiles][4] = {};
  Sum sums[kTiles][4] = {}, totals[4] = {};
  const int first = static_cast<int>(static_cast<long long>(steps) * warp / kWarps);
  const int last = static_cast<int>(static_cast<long long>(steps) * (warp + 1) / kWarps);
  int of = first / in_group,
      left = in_group - first % in_group;  // the group, and its steps to come
  Step<Kind, kWords> next;
  if (first < last) next.load(codes, row, row_words, input, present, first);
  for (int step = first; step < last; ++step) {
    const Step<Kind, kWords> now = next;
    if (step + 1 < last) next.load(codes, row, row_words, input, present, step + 1);
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      unsigned x[kPairs], b[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) x[i] = now.x[word * kPairs + i];
      Kind::arrange(x, b);
      const unsigned ones[4] = {Kind::kOnes, Kind::kOnes, Kind::kOnes, Kind::kOnes};
#pragma unroll
      for (int half = 0; half < Kind::kHalves; ++half)
        Kind::multiply(totals, ones, b[2 * half], b[2 * half + 1]);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        unsigned upper[kPairs], lower[kPairs];
        kind.operands(now.codes[tile][0][word], upper);
        kind.operands(now.codes[tile][1][word], lower);
#pragma unroll
        for (int half = 0; half < Kind::kHalves; ++half) {
          const unsigned w[4] = {upper[2 * half], lower[2 * half], upper[2 * half + 1],
                                 lower[2 * half + 1]};
          Kind::multiply(sums[tile], w, b[2 * half], b[2 * half + 1]);
        }
      }
    }
    if (--left != 0 && step + 1 != last) continue;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const long long r = row[tile][i / 2], place = r * groups + of;
        const float total = static_cast<float>(totals[i % 2]);
        const float z = zero == nullptr ? 0.0f : zero[r * zero_row + of * zero_group];
        float value = static_cast<float>(sums[tile][i]) - (z - Kind::kCentre) * total;
        if (scale != nullptr) value *= scale[place];
        if (offset != nullptr) value += offset[place] * total;
        found[tile][i] += value;
        sums[tile][i] = 0;
      }
#pragma unroll
    for (int i = 0; i < 4; ++i) totals[i] = 0;
    left = in_group;
    ++of;
  }

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      parts[warp][16 * tile + 8 * (i / 2) + g][2 * t + i % 2] = found[tile][i];
  __syncthreads();
  const long long n = first_row + threadIdx.x % kRows;
  const int m = threadIdx.x / kRows;
  if (n >= rows || m >= samples) return;
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += parts[w][threadIdx.x % kRows][m];
  if (a != nullptr) sum *= a[m];
  if (bias != nullptr) sum += Kind::bias(bias, n);
  y[m * rows + n] = Kind::output(sum);
}

#define COFIRE_FEW_ROWS(name, Kind, words)                                                     \
  extern "C" __global__ void __launch_bounds__(32 * kWarps)                                    \
      name(const unsigned* __restrict__ input, const unsigned* __restrict__ codes,             \
           const float* __restrict__ scale, const float* __restrict__ zero,                    \
           const float* __restrict__ offset, const Kind::Output* __restrict__ bias,            \
           const float* __restrict__ a, Kind::Output* __restrict__ y,                          \
           const unsigned* __restrict__ table, long long samples, long long rows,              \
           long long columns, long long group, long long zero_row, long long zero_group) {     \
    few_rows<Kind, words>(kind_of<Kind>(table), input, codes, scale, zero, offset, bias, a, y, \
                          samples, rows, columns, group, zero_row, zero_group);                \
  }

template <class Kind>
__device__ __forceinline__ Kind kind_of(const unsigned*) {
  return {};
}

template <>
__device__ __forceinline__ Table kind_of<Table>(const unsigned* table) {
  Table kind;
#pragma unroll
  for (int i = 0; i < 4; ++i) kind.table[i] = table[i];
  return kind;
}

COFIRE_FEW_ROWS(qlinear_f16_32_kernel, Half, 1)
COFIRE_FEW_ROWS(qlinear_f16_64_kernel, Half, 2)
COFIRE_FEW_ROWS(qlinear_f16_128_kernel, Half, 4)
COFIRE_FEW_ROWS(qlinear_bf16_32_kernel, Brain, 1)
COFIRE_FEW_ROWS(qlinear_bf16_64_kernel, Brain, 2)
COFIRE_FEW_ROWS(qlinear_bf16_128_kernel, Brain, 4)
COFIRE_FEW_ROWS(qlinear_s8_32_kernel, Byte, 1)
COFIRE_FEW_ROWS(qlinear_s8_64_kernel, Byte, 2)
COFIRE_FEW_ROWS(qlinear_s8_128_kernel, Byte, 4)
COFIRE_FEW_ROWS(qlinear_table_32_kernel, Table, 1)
COFIRE_FEW_ROWS(qlinear_table_64_kernel, Table, 2)
COFIRE_FEW_ROWS(qlinear_table_128_kernel, Table, 4)
