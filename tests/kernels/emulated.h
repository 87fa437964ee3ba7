// SPDX-License-Identifier: Apache-2.0
// Enough of CUDA to run csrc/cuda/lowbit.cu and sparse.cu on a CPU: a thread per thread of a block, and models of the
// instructions that it uses, from the PTX manual.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include <pthread.h>

#define __device__
#define __global__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define COFIRE_EMULATED

struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
struct Index {
  unsigned x;
};
static thread_local Index threadIdx, blockIdx;
static pthread_barrier_t block_barrier, warp_barriers[32];
static thread_local int warp_of_thread;
static unsigned exchange_a[32][32][4], exchange_b[32][32][2];

static void __syncthreads() { pthread_barrier_wait(&block_barrier); }

static float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

static unsigned and_or(unsigned a, unsigned b, unsigned c) { return (a & b) | c; }

static unsigned permute(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = (static_cast<uint64_t>(b) << 32) | a;
  unsigned d = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = (selector >> (4 * i)) & 15;
    unsigned byte = (bytes >> (8 * (pick & 7))) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;  // the sign of the byte
    d |= byte << (8 * i);
  }
  return d;
}

static float from_f16(unsigned bits) {
  _Float16 x;
  const uint16_t low = static_cast<uint16_t>(bits);
  std::memcpy(&x, &low, 2);
  return static_cast<float>(x);
}
static unsigned short to_f16(float x) {
  const _Float16 y = static_cast<_Float16>(x);
  unsigned short bits;
  std::memcpy(&bits, &y, 2);
  return bits;
}
static float from_bf16(unsigned bits) { return __uint_as_float(bits << 16); }
static unsigned short to_bf16(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<unsigned short>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static unsigned fma_f16x2(unsigned a, unsigned b, unsigned c) {
  unsigned d = 0;
  for (int i = 0; i < 32; i += 16)
    d |= static_cast<unsigned>(to_f16(std::fma(from_f16(a >> i), from_f16(b >> i), from_f16(c >> i)))) << i;
  return d;
}
static unsigned fma_bf16x2(unsigned a, unsigned b, unsigned c) {
  unsigned d = 0;
  for (int i = 0; i < 32; i += 16)
    d |= static_cast<unsigned>(to_bf16(std::fma(from_bf16((a >> i) & 0xffff), from_bf16((b >> i) & 0xffff),
                                                from_bf16((c >> i) & 0xffff))))
         << i;
  return d;
}

// m16n8: register r of A holds row g + 8 (r % 2) and, of each half r / 2 of the columns, `per` at 4 t ... of
// thread 4 g + t; register r of B the same columns of column g.
template <class Sum, class Read>
static void multiply(Sum (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, int per, Read read) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  std::memcpy(exchange_a[warp][lane], a, 16);
  exchange_b[warp][lane][0] = b0, exchange_b[warp][lane][1] = b1;
  pthread_barrier_wait(&warp_barriers[warp]);
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (int half = 0; half < 2; ++half)
      for (int of = 0; of < 4; ++of)
        for (int e = 0; e < per; ++e)
          c[i] += read(exchange_a[warp][4 * (row % 8) + of][2 * half + row / 8], e) *
                  read(exchange_b[warp][4 * column + of][half], e);
  }
  pthread_barrier_wait(&warp_barriers[warp]);
}

static void multiply_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply(c, a, b0, b1, 2, [](unsigned r, int e) { return from_f16(r >> (16 * e)); });
}
static void multiply_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply(c, a, b0, b1, 2, [](unsigned r, int e) { return from_bf16((r >> (16 * e)) & 0xffff); });
}
static void multiply_s8(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply(c, a, b0, b1, 4, [](unsigned r, int e) { return static_cast<int>(static_cast<int8_t>(r >> (8 * e))); });
}

// ------------------------------------------------------------------------------------------ of sparse.cu only

using Address = const char*;

static Address address_of(const void* p) { return static_cast<Address>(p); }
static void copy_units(Address to, const void* from, int left) {
  for (int i = 0; i < 4; ++i)
    if (left > 32 * i) std::memcpy(const_cast<char*>(to) + 512 * i, static_cast<Address>(from) + 512 * i, 16);
}
static void end_group() {}
template <int kLeft>
static void await_group() {}
static void __syncwarp() { pthread_barrier_wait(&warp_barriers[threadIdx.x / 32]); }

static unsigned exchange(unsigned x, int from) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  exchange_b[warp][lane][0] = x;
  pthread_barrier_wait(&warp_barriers[warp]);
  const unsigned found = exchange_b[warp][from < 0 ? lane : from][0];
  pthread_barrier_wait(&warp_barriers[warp]);
  return found;
}
static unsigned add_lane_below(unsigned x, int distance) {
  const int from = static_cast<int>(threadIdx.x % 32) - distance;
  const unsigned below = exchange(x, from);
  return from < 0 ? x : x + below;
}
static unsigned from_neighbour(unsigned x) { return exchange(x, static_cast<int>(threadIdx.x % 32) ^ 1); }

template <unsigned kFirst, unsigned kSecond>
static unsigned take_pair(Address& from, unsigned mask) {
  uint16_t pair[2] = {};
  if (mask & kFirst) std::memcpy(&pair[0], from, 2), from += 2;
  if (mask & kSecond) std::memcpy(&pair[1], from, 2), from += 2;
  return pair[0] | static_cast<unsigned>(pair[1]) << 16;
}

// mma.sp m16n8k32: registers of A as those of m16n8k16, with the two values of group t (and t + 4) of four columns;
// B has its columns 8 r + 2 t and the next in register r; places as sparse.cu says.
template <class Read>
static void multiply_24(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned places, int pair,
                        Read read) {
  static unsigned all_b[32][32][4], all_places[32][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  std::memcpy(exchange_a[warp][lane], a, 16);
  std::memcpy(all_b[warp][lane], b, 16);
  all_places[warp][lane] = places;
  pthread_barrier_wait(&warp_barriers[warp]);
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2, quad = 4 * (row % 8);
    for (int group = 0; group < 8; ++group) {
      const unsigned values = exchange_a[warp][quad + group % 4][row / 8 + 2 * (group / 4)];
      const unsigned of = all_places[warp][quad + 2 * pair + group / 4] >> (16 * (row / 8) + 4 * (group % 4));
      for (int e = 0; e < 2; ++e) {
        const int k = 4 * group + ((of >> (2 * e)) & 3);
        c[i] += read(values, e) * read(all_b[warp][4 * column + k % 8 / 2][k / 8], k % 2);
      }
    }
  }
  pthread_barrier_wait(&warp_barriers[warp]);
}
template <int kPair>
static void multiply_24_f16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned places) {
  multiply_24(c, a, b, places, kPair, [](unsigned r, int e) { return from_f16(r >> (16 * e)); });
}
template <int kPair>
static void multiply_24_bf16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned places) {
  multiply_24(c, a, b, places, kPair, [](unsigned r, int e) { return from_bf16((r >> (16 * e)) & 0xffff); });
}

// ------------------------------------------------------------------------------------------------------ running

template <class Call>
static void run_blocks(int blocks, int threads, Call call) {
  pthread_barrier_init(&block_barrier, nullptr, threads);
  for (int w = 0; w < threads / 32; ++w) pthread_barrier_init(&warp_barriers[w], nullptr, 32);
  for (int block = 0; block < blocks; ++block) {
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i)
      running.emplace_back([=] {
        threadIdx.x = i, blockIdx.x = block;
        call();
      });
    for (auto& thread : running) thread.join();
  }
}

using Kernel = void (*)(const void*, const void*, const void*, const void*, const void*, const void*, const void*,
                        void*, const void*, long long, long long, long long, long long, long long, long long);

extern "C" void emulate(Kernel kernel, int blocks, int threads, void** p, const long long* n) {
  run_blocks(blocks, threads, [=] {
    kernel(p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], n[0], n[1], n[2], n[3], n[4], n[5]);
  });
}

using Seven = void (*)(void*, void*, void*, void*, void*, void*, void*, long long, long long, long long, long long);
using Six = void (*)(void*, void*, void*, void*, void*, void*, long long, long long, long long, long long);

extern "C" void emulate_sparse(void* kernel, int blocks, int threads, void** p, int pointers, const long long* n) {
  run_blocks(blocks, threads, [=] {
    if (pointers == 7)
      reinterpret_cast<Seven>(kernel)(p[0], p[1], p[2], p[3], p[4], p[5], p[6], n[0], n[1], n[2], n[3]);
    else
      reinterpret_cast<Six>(kernel)(p[0], p[1], p[2], p[3], p[4], p[5], n[0], n[1], n[2], n[3]);
  });
}
