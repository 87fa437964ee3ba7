// SPDX-License-Identifier: Apache-2.0
// Products of at most 64 rows with compressed weights, in CUDA C++: y^T = W x^T on the tensor
// cores, of which W is the first operand, so that few rows of x fill the second. No header, so that
// NVRTC and nvcc both take it.
//
// A warp multiplies panels of 16 rows of W, 64 columns (a slab) at a time. The order of the columns
// within a slab is free as long as both operands have the same: thread t of a quad takes the 16
// columns from 16 t on, which it loads from x by 128 bits.
//
// Bitmaps: lane 4 g + t has one word of 32 bits, its columns of rows g and g + 8 in the order of
// the operand's registers. The values of a slab stand by tile (four columns of each thread), then
// by lane, then by bit, so a lane needs one address per tile, from one prefix sum over the warp for
// all four, and then goes from bit to bit: a predicated load and a predicated addition per weight.
//
// 2:4: two values of each four columns in the order of the operand, and two bits each that say
// which. The tensor cores take both as they are: nothing is decoded.
//
// The slabs are shared among the warps of a block and among blocks, whose sums are added in a fixed
// order.

#ifndef COFIRE_EMULATED  // a test has a model of these, to run the rest without a GPU

using Address = unsigned;  // in shared memory

__device__ __forceinline__ Address address_of(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// A warp's lanes copy what is left of at most 128 units of 16 bytes, every 32nd each: as one piece,
// so that the addresses are computed once.
__device__ __forceinline__ void copy_units(Address to, const void* from, int left) {
  asm volatile(
      "{\n"
      "  .reg .pred p, q, r, s;\n"
      "  setp.gt.s32 p, %2, 0;\n"
      "  setp.gt.s32 q, %2, 32;\n"
      "  setp.gt.s32 r, %2, 64;\n"
      "  setp.gt.s32 s, %2, 96;\n"
      "  @p cp.async.cg.shared.global [%0], [%1], 16;\n"
      "  @q cp.async.cg.shared.global [%0 + 512], [%1 + 512], 16;\n"
      "  @r cp.async.cg.shared.global [%0 + 1024], [%1 + 1024], 16;\n"
      "  @s cp.async.cg.shared.global [%0 + 1536], [%1 + 1536], 16;\n"
      "}" ::"r"(to),
      "l"(from), "r"(left));
}

__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;"); }

// all groups but the last `kLeft` have arrived
template <int kLeft>
__device__ __forceinline__ void await_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// x, and that of the lane `distance` below, where there is one
__device__ __forceinline__ unsigned add_lane_below(unsigned x, int distance) {
  asm volatile(
      "{\n"
      "  .reg .pred p;\n"
      "  .reg .b32 below;\n"
      "  shfl.sync.up.b32 below|p, %0, %1, 0, 0xffffffff;\n"
      "  @p add.u32 %0, %0, below;\n"
      "}"
      : "+r"(x)
      : "r"(distance));
  return x;
}

__device__ __forceinline__ unsigned from_neighbour(unsigned x) {
  return __shfl_xor_sync(0xffffffff, x, 1);
}

// The weights of two bits, 0 where a bit is not set; `from` moves behind what was taken.
template <unsigned kFirst, unsigned kSecond>
__device__ __forceinline__ unsigned take_pair(Address& from, unsigned mask) {
  unsigned pair;
  asm volatile(
      "{\n"
      "  .reg .pred p, q;\n"
      "  .reg .b32 s, upper;\n"
      "  and.b32 s, %2, %3;\n"
      "  setp.ne.u32 p, s, 0;\n"
      "  and.b32 s, %2, %4;\n"
      "  setp.ne.u32 q, s, 0;\n"
      "  mov.b32 %0, 0;\n"
      "  @p ld.shared.u16 %0, [%1];\n"
      "  @p add.u32 %1, %1, 2;\n"
      "  @q ld.shared.u16 upper, [%1];\n"
      "  @q add.u32 %1, %1, 2;\n"
      "  @q prmt.b32 %0, %0, upper, 0x5410;\n"
      "}"
      : "=&r"(pair), "+r"(from)
      : "r"(mask), "n"(kFirst), "n"(kSecond));
  return pair;
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

// The first operand has two of each four columns; places: of threads 2 kPair and 2 kPair + 1 of
// each quad, who say it of 16 columns each: row g in the lower half, row g + 8 in the upper.
template <int kPair>
__device__ __forceinline__ void multiply_24_f16(float (&c)[4], const unsigned (&a)[4],
                                                const unsigned (&b)[4], unsigned places) {
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, "
      "{%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(places), "n"(kPair));
}

template <int kPair>
__device__ __forceinline__ void multiply_24_bf16(float (&c)[4], const unsigned (&a)[4],
                                                 const unsigned (&b)[4], unsigned places) {
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, "
      "{%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
        "r"(places), "n"(kPair));
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

struct Half {
  static __device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4],
                                                  unsigned b0, unsigned b1) {
    multiply_f16(c, a, b0, b1);
  }
  template <int kPair>
  static __device__ __forceinline__ void multiply_24(float (&c)[4], const unsigned (&a)[4],
                                                     const unsigned (&b)[4], unsigned places) {
    multiply_24_f16<kPair>(c, a, b, places);
  }
  static __device__ __forceinline__ unsigned short output(float y) { return to_f16(y); }
};

struct Brain {
  static __device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4],
                                                  unsigned b0, unsigned b1) {
    multiply_bf16(c, a, b0, b1);
  }
  template <int kPair>
  static __device__ __forceinline__ void multiply_24(float (&c)[4], const unsigned (&a)[4],
                                                     const unsigned (&b)[4], unsigned places) {
    multiply_24_bf16<kPair>(c, a, b, places);
  }
  static __device__ __forceinline__ unsigned short output(float y) { return to_bf16(y); }
};

constexpr int kWarps = 8, kPanel = 16, kSlab = 64;

// Which part of the product a warp computes: kPanels of the warps of a block have a panel each, the
// others share their slabs.
template <int kTiles, int kPanels>
struct Share {
  static constexpr int kShares = kWarps / kPanels, kRows = kPanel * kPanels;
  long long first_row, panel;
  int lane, warp, slabs, split, begin, end;

  __device__ __forceinline__ Share(long long rows, long long columns, long long part) {
    const int blocks = static_cast<int>((rows + kRows - 1) / kRows);
    const long long panels = (rows + kPanel - 1) / kPanel;
    lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    split = static_cast<int>(blockIdx.x) / blocks;
    first_row = static_cast<long long>(static_cast<int>(blockIdx.x) % blocks) * kRows;
    panel = first_row / kPanel + warp % kPanels;
    if (panel >= panels) panel = panels - 1;  // read in vain, never written
    slabs = static_cast<int>(columns / kSlab);
    const int first = split * static_cast<int>(part);
    const int count = (first + part < slabs ? static_cast<int>(part) : slabs - first);
    begin = first + count * (warp / kPanels) / kShares;
    end = first + count * (warp / kPanels + 1) / kShares;
  }
};

// The words of x that a thread multiplies in a slab: 16 columns of row g of each tile of 8 rows.
template <int kTiles>
struct Input {
  int place[kTiles];
  unsigned words[kTiles][8];

  __device__ __forceinline__ Input(int lane, long long samples, long long columns) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int m = 8 * tile + lane / 4, last = static_cast<int>(samples) - 1;
      place[tile] = (m < last ? m : last) * static_cast<int>(columns / 8) + lane % 4 * 2;
    }
  }
  __device__ __forceinline__ void load(const uint4* input, int slab) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 v = input[place[tile] + slab * 8 + half];
        unsigned* to = words[tile] + 4 * half;
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
      }
  }
};

// The sums of the warps of a block, in their order: to y, or beside those of other blocks.
template <class Kind, int kTiles, int kPanels>
__device__ __forceinline__ void finish(const Share<kTiles, kPanels>& share,
                                       const float (&sums)[kTiles][4], float* parts,
                                       const float* bias, float* partial, unsigned short* y,
                                       long long samples, long long rows) {
  constexpr int kRows = kPanel * kPanels, kSamples = 8 * kTiles;
  __syncthreads();  // parts lie where others may still read values
  const int g = share.lane / 4, t = share.lane % 4;
  float* mine = parts + share.warp / kPanels * (kRows * kSamples) + share.warp % kPanels * kPanel;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      mine[(8 * tile + 2 * t + i % 2) * kRows + g + 8 * (i / 2)] = sums[tile][i];
  __syncthreads();
#pragma unroll 1
  for (int place = threadIdx.x; place < kRows * kSamples; place += 32 * kWarps) {
    const long long n = share.first_row + place % kRows;
    const int m = place / kRows;
    if (n >= rows || m >= samples) continue;
    float sum = bias != nullptr && share.split == 0 ? bias[n] : 0.0f;
#pragma unroll
    for (int w = 0; w < Share<kTiles, kPanels>::kShares; ++w)
      sum += parts[w * kRows * kSamples + place];
    if (partial != nullptr) {
      partial[(share.split * samples + m) * rows + n] = sum;
    } else {
      y[m * rows + n] = Kind::output(sum);
    }
  }
}

constexpr int kStages = 3, kUnits = 128, kStageBytes = 16 * kUnits;  // a slab without any zero

// places, two words per panel and slab, one slab more per panel and three at the end: where the
// slab's values begin, in units of eight, and the numbers of those before tiles 1, 2 and 3, ten
// bits each.
template <class Kind, int kTiles, int kPanels>
__device__ __forceinline__ void bitmap_rows(const uint2* places, const unsigned* masks,
                                            const uint4* values, const uint4* input,
                                            const float* bias, float* partial, unsigned short* y,
                                            long long samples, long long rows, long long columns,
                                            long long part) {
  __shared__ uint4 ring[kWarps][kStages][kUnits];
  const Share<kTiles, kPanels> share(rows, columns, part);
  const int lane = share.lane, end = share.end;
  Input<kTiles> x(lane, samples, columns);
  places += share.panel * (share.slabs + 1) + share.begin;
  masks += (share.panel * share.slabs + share.begin) * 32 + lane;
  const Address mine = address_of(ring[share.warp][0]);
  // A slab that is not there is copied as one without values, so that every step has its group.
  const auto copy = [&](uint2 first, uint2 behind, bool present, Address stage) {
    const int left = present ? static_cast<int>(behind.x - first.x) - lane : 0;
    copy_units(stage + lane * 16, values + (first.x + lane), left);
    end_group();
  };

  // Masks come two slabs ahead of their use, places four; behind the last ones are some more to
  // read in vain.
  float sums[kTiles][4] = {};
  unsigned mask = 0, next_mask = 0, before = 0, next_before = 0;
  uint2 next = {}, after = {};
  if (share.begin < end) {
    const uint2 first = places[0], second = places[1];
    next = places[2], after = places[3];
    copy(first, second, true, mine);
    copy(second, next, share.begin + 1 < end, mine + kStageBytes);
    before = first.y, next_before = second.y;
    mask = masks[0], next_mask = masks[32];
  }
  Address full = mine, filling = mine + kStageBytes, free = mine + 2 * kStageBytes;
#pragma unroll 1
  for (int slab = share.begin; slab < end; ++slab) {
    x.load(input, slab);
    await_group<1>();
    __syncwarp();  // also: nobody reads the stage any more that is filled now
    copy(next, after, slab + 2 < end, free);
    const unsigned bits = mask, of_tiles = before;
    mask = next_mask, before = next_before, next_before = next.y, next = after;
    next_mask = masks[64], after = places[4];
    masks += 32, ++places;

    // the number of bits in each byte, and their sums over the lanes before
    unsigned count = bits - ((bits >> 1) & 0x55555555u);
    count = (count & 0x33333333u) + ((count >> 2) & 0x33333333u);
    count = (count + (count >> 4)) & 0x0f0f0f0fu;
    unsigned sum = count;  // that of all lanes may carry into the next byte, and is not used
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) sum = add_lane_below(sum, distance);
    sum -= count;
    const Address base = full;
    full = filling, filling = free, free = base;
    Address from[4] = {base + (sum & 255) * 2, base + (((sum >> 8) & 255) + (of_tiles & 1023)) * 2,
                       base + (((sum >> 16) & 255) + ((of_tiles >> 10) & 1023)) * 2,
                       base + ((sum >> 24) + (of_tiles >> 20)) * 2};
    unsigned w[4][4];
    // The four tiles side by side: each is a chain of additions.
    w[0][0] = take_pair<1u << 0, 1u << 1>(from[0], bits);
    w[1][0] = take_pair<1u << 8, 1u << 9>(from[1], bits);
    w[2][0] = take_pair<1u << 16, 1u << 17>(from[2], bits);
    w[3][0] = take_pair<1u << 24, 1u << 25>(from[3], bits);
    w[0][1] = take_pair<1u << 2, 1u << 3>(from[0], bits);
    w[1][1] = take_pair<1u << 10, 1u << 11>(from[1], bits);
    w[2][1] = take_pair<1u << 18, 1u << 19>(from[2], bits);
    w[3][1] = take_pair<1u << 26, 1u << 27>(from[3], bits);
    w[0][2] = take_pair<1u << 4, 1u << 5>(from[0], bits);
    w[1][2] = take_pair<1u << 12, 1u << 13>(from[1], bits);
    w[2][2] = take_pair<1u << 20, 1u << 21>(from[2], bits);
    w[3][2] = take_pair<1u << 28, 1u << 29>(from[3], bits);
    w[0][3] = take_pair<1u << 6, 1u << 7>(from[0], bits);
    w[1][3] = take_pair<1u << 14, 1u << 15>(from[1], bits);
    w[2][3] = take_pair<1u << 22, 1u << 23>(from[2], bits);
    w[3][3] = take_pair<1u << 30, 1u << 31>(from[3], bits);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
        Kind::multiply(sums[tile], w[i], x.words[tile][2 * i], x.words[tile][2 * i + 1]);
  }
  await_group<0>();
  finish<Kind>(share, sums, reinterpret_cast<float*>(ring), bias, partial, y, samples, rows);
}

// A slab is two products of 32 columns: eight words of values per lane, and one word of places, of
// the first product in threads 0 and 1 of a quad, of the second in threads 2 and 3.
struct Slab24 {
  unsigned w[2][4], places;

  __device__ __forceinline__ void load(const uint4* values, const unsigned* metadata, int slab) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      const uint4 v = values[(slab * 2 + step) * 32];
      w[step][0] = v.x, w[step][1] = v.y, w[step][2] = v.z, w[step][3] = v.w;
    }
    places = metadata[slab * 32];
  }
};

template <class Kind, int kTiles, int kPanels>
__device__ __forceinline__ void two_four_rows(const unsigned* metadata, const uint4* values,
                                              const uint4* input, const float* bias, float* partial,
                                              unsigned short* y, long long samples, long long rows,
                                              long long columns, long long part) {
  const Share<kTiles, kPanels> share(rows, columns, part);
  __shared__ float parts[kWarps * kPanel * 8 * kTiles];
  const int lane = share.lane, end = share.end;
  const bool odd = lane % 2 == 1;
  Input<kTiles> x(lane, samples, columns);
  metadata += share.panel * share.slabs * 32 + lane;
  values += share.panel * share.slabs * 64 + lane;
  float sums[kTiles][4] = {};
  Slab24 next = {}, after = {};
  if (share.begin < end) {
    next.load(values, metadata, share.begin);
    after.load(values, metadata, share.begin + 1 < end ? share.begin + 1 : share.begin);
  }
#pragma unroll 1
  for (int slab = share.begin; slab < end; ++slab) {
    const Slab24 now = next;
    next = after;
    x.load(input, slab);
    if (slab + 2 < end) after.load(values, metadata, slab + 2);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      // An even thread multiplies the first two of each four columns, its neighbour the others.
      unsigned b[2][4];
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const unsigned* of = x.words[tile] + 4 * step;
        const unsigned one = from_neighbour(odd ? of[0] : of[1]);
        const unsigned two = from_neighbour(odd ? of[2] : of[3]);
        b[step][0] = odd ? one : of[0];
        b[step][1] = odd ? two : of[2];
        b[step][2] = odd ? of[1] : one;
        b[step][3] = odd ? of[3] : two;
      }
      Kind::template multiply_24<0>(sums[tile], now.w[0], b[0], now.places);
      Kind::template multiply_24<1>(sums[tile], now.w[1], b[1], now.places);
    }
  }
  finish<Kind>(share, sums, parts, bias, partial, y, samples, rows);
}

#define COFIRE_SPARSE(kind, Kind, samples_name, tiles, panels)                                   \
  extern "C" __global__ void __launch_bounds__(32 * kWarps, (tiles) < 8 ? 2 : 1)                 \
      spmm_bitmap_##kind##_##samples_name##_kernel(                                              \
          const uint2* __restrict__ places, const unsigned* __restrict__ masks,                  \
          const uint4* __restrict__ values, const uint4* __restrict__ input,                     \
          const float* __restrict__ bias, float* __restrict__ partial,                           \
          unsigned short* __restrict__ y, long long samples, long long rows, long long columns,  \
          long long part) {                                                                      \
    bitmap_rows<Kind, tiles, panels>(places, masks, values, input, bias, partial, y, samples,    \
                                     rows, columns, part);                                       \
  }                                                                                              \
  extern "C" __global__ void __launch_bounds__(32 * kWarps, (tiles) < 8 ? 2 : 1)                 \
      spmm_24_##kind##_##samples_name##_kernel(                                                  \
          const unsigned* __restrict__ metadata, const uint4* __restrict__ values,               \
          const uint4* __restrict__ input, const float* __restrict__ bias,                       \
          float* __restrict__ partial, unsigned short* __restrict__ y, long long samples,        \
          long long rows, long long columns, long long part) {                                   \
    two_four_rows<Kind, tiles, panels>(metadata, values, input, bias, partial, y, samples, rows, \
                                       columns, part);                                           \
  }

// More rows of x: more panels per block, which share what they read of x.
COFIRE_SPARSE(f16, Half, 8, 1, 2)
COFIRE_SPARSE(f16, Half, 16, 2, 4)
COFIRE_SPARSE(f16, Half, 32, 4, 8)
COFIRE_SPARSE(f16, Half, 64, 8, 8)
COFIRE_SPARSE(bf16, Brain, 8, 1, 2)
COFIRE_SPARSE(bf16, Brain, 16, 2, 4)
COFIRE_SPARSE(bf16, Brain, 32, 4, 8)
COFIRE_SPARSE(bf16, Brain, 64, 8, 8)
