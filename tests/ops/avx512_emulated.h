// The AVX-512 and AMX instructions that the kernels name, written out for a CPU with AVX2, so that their form runs
// anywhere. Included before everything else; the vectors themselves are split by the compiler.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define __AVX512F__ 1
#define __AVX512BF16__ 1
#define OMNI_IN_REGISTER(vector) (void)(vector)

namespace emulated {

typedef float Floats16 __attribute__((vector_size(64)));
typedef uint32_t Words16 __attribute__((vector_size(64)));
typedef uint16_t Halves32 __attribute__((vector_size(64)));
typedef double Doubles8 __attribute__((vector_size(64)));

template <class To, class From>
inline To as(const From& from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Words16 load(const void* from) {
  Words16 vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

// Even elements of the pairs after odd ones, as the instruction is specified.
template <class Sums, class A, class B>
inline Floats16 dot(Sums sums, A a, B b) {
  Floats16 result = as<Floats16>(sums);
  const Words16 left = as<Words16>(a), right = as<Words16>(b);
  result += as<Floats16>(left & 0xffff0000u) * as<Floats16>(right & 0xffff0000u);
  return result + as<Floats16>(left << 16) * as<Floats16>(right << 16);
}

template <class A, class Order, class B>
inline Words16 permute(A a, Order order, B b) {
  Halves32 both[2] = {as<Halves32>(a), as<Halves32>(b)}, result;
  const Halves32 index = as<Halves32>(order);
  for (int i = 0; i < 32; ++i) result[i] = both[index[i] / 32 % 2][index[i] % 32];
  return as<Words16>(result);
}

// Rounded to the nearest, ties to even; NaNs stay quiet ones.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = as<uint32_t>(value);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

struct Halves16 {
  uint16_t halves[16];
};

template <class Vector>
inline Halves16 narrow(Vector vector) {
  const Floats16 values = as<Floats16>(vector);
  Halves16 result;
  for (int i = 0; i < 16; ++i) result.halves[i] = to_bfloat16(values[i]);
  return result;
}

template <class Upper, class Lower>
inline Words16 narrow_two(Upper upper, Lower lower) {
  const Halves16 both[2] = {narrow(lower), narrow(upper)};
  return as<Words16>(both);
}

template <class Vector>
inline __m256d upper(Vector vector) {
  __m256d halves[2];
  std::memcpy(halves, &vector, sizeof(halves));
  return halves[1];
}

template <class Vector>
inline __m256 lower(Vector vector) {
  __m256 halves[2];
  std::memcpy(halves, &vector, sizeof(halves));
  return halves[0];
}

inline Floats16 widen(__m256i halves) {
  __m128i parts[2];
  std::memcpy(parts, &halves, sizeof(parts));
  const __m256 wide[2] = {_mm256_cvtph_ps(parts[0]), _mm256_cvtph_ps(parts[1])};
  Floats16 result;
  std::memcpy(&result, wide, sizeof(result));
  return result;
}

#if defined(__AMX_BF16__)
// What the matrix unit holds, for tiles of whole rows only.
struct Tiles {
  bool ready = false;
  uint8_t rows[8];
  alignas(64) float sums[8][16][16];
};
inline thread_local Tiles unit;

inline void configure(const void* shapes) {
  const auto* bytes = static_cast<const uint8_t*>(shapes);
  unit.ready = !unit.ready && bytes[0] == 1;
  std::memcpy(unit.rows, bytes + 48, 8);
  for (int tile = 0; tile < 8; ++tile)
    unit.ready = unit.ready && bytes[16 + 2 * tile] == 64 && bytes[17 + 2 * tile] == 0 && unit.rows[tile] - 1u < 16u;
}

template <class Row>
inline void for_each_tile_row(int tile, const Row& row) {
  if (!unit.ready) __builtin_trap();
  for (int index = 0; index < unit.rows[tile]; ++index) row(index);
}

inline void load_tile(int tile, const void* from, int64_t stride) {
  for_each_tile_row(tile, [&](int row) {
    std::memcpy(unit.sums[tile][row], static_cast<const char*>(from) + row * stride, 64);
  });
}

inline void store_tile(int tile, void* to, int64_t stride) {
  for_each_tile_row(tile, [&](int row) { std::memcpy(static_cast<char*>(to) + row * stride, unit.sums[tile][row], 64); });
}

inline void multiply_tiles(int to, int a, int b) {
  if (unit.rows[to] != unit.rows[a] || unit.rows[b] != 16) __builtin_trap();
  for_each_tile_row(to, [&](int row) {
    float even[16] = {}, odd[16] = {};
    for (int pair = 0; pair < 16; ++pair) {
      const uint32_t left = as<uint32_t>(unit.sums[a][row][pair]);
      for (int column = 0; column < 16; ++column) {
        const uint32_t right = as<uint32_t>(unit.sums[b][pair][column]);
        even[column] += as<float>(left << 16) * as<float>(right << 16);
        odd[column] += as<float>(left & 0xffff0000u) * as<float>(right & 0xffff0000u);
      }
    }
    for (int column = 0; column < 16; ++column) unit.sums[to][row][column] += even[column] + odd[column];
  });
}
#endif

}  // namespace emulated

#if defined(__AMX_BF16__)
#define _tile_loadconfig(shapes) emulated::configure(shapes)
#define _tile_release() (emulated::unit.ready = false)
#define _tile_zero(tile) std::memset(emulated::unit.sums[tile], 0, 1024)
#define _tile_loadd(tile, from, stride) emulated::load_tile(tile, from, stride)
#define _tile_stream_loadd(tile, from, stride) emulated::load_tile(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::store_tile(tile, to, stride)
#define _tile_dpbf16ps(to, a, b) emulated::multiply_tiles(to, a, b)
#endif
#define __m512 emulated::Floats16
#define __m512d emulated::Doubles8
#define __m512i emulated::Words16
#define __m512bh emulated::Words16
#define _mm512_loadu_si512(from) emulated::load(from)
#define _mm512_storeu_si512(to, vector) std::memcpy(to, &static_cast<const emulated::Words16&>(vector), 64)
#define _mm512_set1_epi32(word) (emulated::Words16{} + uint32_t(word))
#define _mm512_set1_ps(value) (emulated::Floats16{} + float(value))
#define _mm512_dpbf16_ps(sums, a, b) emulated::dot(sums, a, b)
#define _mm512_permutex2var_epi16(a, order, b) emulated::permute(a, order, b)
#define _mm512_cvtneps_pbh(vector) emulated::narrow(vector)
#define _mm512_cvtne2ps_pbh(upper, lower) emulated::narrow_two(upper, lower)
#define _mm512_castps_pd(vector) emulated::as<emulated::Doubles8>(vector)
#define _mm512_castps512_ps256(vector) emulated::lower(vector)
#define _mm512_extractf64x4_pd(vector, part) emulated::upper(vector)
#define _mm512_cvtph_ps(halves) emulated::widen(halves)
