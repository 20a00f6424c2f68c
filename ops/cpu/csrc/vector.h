// Float vectors of the widest form the compiler was allowed, and the element types that are widened into them.
//
// One source for four forms, chosen by the flags: AVX-512 with bfloat16 dot products, AVX-512, AVX2 with FMA,
// and 16-byte vectors of the GCC/Clang extension, which is NEON on arm64 and SSE2 on x86-64.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define OMNI_INLINE inline __attribute__((always_inline))
#define OMNI_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define OMNI_UNROLL _Pragma("unroll")
#else
#define OMNI_UNROLL _Pragma("GCC unroll 16")
#endif

// Keeps a vector in a register: compilers fold a load into each instruction that uses it, and then loads are what a
// loop waits for.
#if defined(OMNI_IN_REGISTER)  // where the form is emulated, no register holds a vector
#elif defined(__x86_64__)
#define OMNI_IN_REGISTER(vector) __asm__("" : "+x"(vector))
#elif defined(__aarch64__)
#define OMNI_IN_REGISTER(vector) __asm__("" : "+w"(vector))
#else
#define OMNI_IN_REGISTER(vector) (void)(vector)
#endif

namespace omni {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#else
constexpr int kVectorBytes = 16;
#if defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif
#endif

constexpr int kLanes = kVectorBytes / 4;  // floats of a vector
constexpr int kLineBytes = 64;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));  // as many as a vector has floats

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
OMNI_INLINE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class Vector>
OMNI_INLINE Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

OMNI_INLINE void store(float* to, Floats vector) { std::memcpy(to, &vector, sizeof(vector)); }

// Not `Floats{} + value`: compilers keep that addition, for the sake of -0.
OMNI_INLINE Floats splat(float value) {
#if defined(__AVX512F__)
  return bits_as<Floats>(_mm512_set1_ps(value));
#elif defined(__AVX2__)
  return bits_as<Floats>(_mm256_set1_ps(value));
#else
  Floats vector;
  for (int lane = 0; lane < kLanes; ++lane) vector[lane] = value;
  return vector;
#endif
}

// kLanes consecutive elements as floats.
OMNI_INLINE Floats widen(const float* from) { return load<Floats>(from); }

OMNI_INLINE Floats widen(const BFloat16* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // of the generic form gcc 12 makes two halves and an insertion
  return bits_as<Floats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16));
#else
  return bits_as<Floats>(__builtin_convertvector(load<Halves>(from), Words) << 16);
#endif
}

OMNI_INLINE Floats widen(const Float16* from) {
#if defined(__AVX512F__)
  return bits_as<Floats>(_mm512_cvtph_ps(load<__m256i>(from)));
#elif defined(__F16C__) && defined(__AVX2__)
  return bits_as<Floats>(_mm256_cvtph_ps(load<__m128i>(from)));
#else
  const Words half = __builtin_convertvector(load<Halves>(from), Words);
  const Words magnitude = (half & 0x7fffu) << 13;
  const Floats scaled = bits_as<Floats>(magnitude) * 0x1p112f;  // moves the exponent's bias; exact for subnormals too
  const Words special = (Words)(magnitude >= (0x1fu << 23)) & 0x7f800000u;  // infinity and NaN keep an exponent of ones
  return bits_as<Floats>(bits_as<Words>(scaled) | special | ((half & 0x8000u) << 16));
#endif
}

OMNI_INLINE float to_float(float value) { return value; }

OMNI_INLINE float to_float(BFloat16 value) { return bits_as<float>(uint32_t(value.bits) << 16); }

OMNI_INLINE float to_float(Float16 value) {
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  uint32_t bits = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  if (magnitude >= (0x1fu << 23)) bits |= 0x7f800000u;
  return bits_as<float>(bits | (uint32_t(value.bits & 0x8000) << 16));
}

// Rounds to the nearest, ties to even.
template <class T>
T narrow(float value);

template <>
OMNI_INLINE float narrow<float>(float value) {
  return value;
}

template <>
OMNI_INLINE BFloat16 narrow<BFloat16>(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40)};  // a NaN must not round to infinity
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}

template <>
OMNI_INLINE Float16 narrow<Float16>(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};  // from 65520 on: infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    const float shifted = bits_as<float>(magnitude) + 0.5f;
    return {uint16_t(sign | (bits_as<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1);
  return {uint16_t(sign | (rounded >> 13))};
}

// What `narrow` makes of every value, still as a float.
template <class T>
OMNI_INLINE Floats rounded(Floats values) {
  if constexpr (std::is_same_v<T, float>) {
    return values;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const Words bits = bits_as<Words>(values);
    const Words nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Words is_nan = bits_as<Words>(values != values);
    return bits_as<Floats>(((is_nan & (bits | 0x400000u)) | (~is_nan & nearest)) & 0xffff0000u);
  } else {
#if defined(__F16C__) && defined(__AVX2__) && !defined(__AVX512F__)
    return bits_as<Floats>(_mm256_cvtph_ps(_mm256_cvtps_ph(bits_as<__m256>(values), _MM_FROUND_TO_NEAREST_INT)));
#else
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = to_float(narrow<T>(values[lane]));
    return values;
#endif
  }
}

// Values that are `rounded` already.
template <class T>
OMNI_INLINE void store_rounded(T* to, Floats values) {
  if constexpr (std::is_same_v<T, float>) {
    store(to, values);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    const Halves halves = __builtin_convertvector(bits_as<Words>(values) >> 16, Halves);
    std::memcpy(to, &halves, sizeof(halves));
  } else {
#if defined(__F16C__) && defined(__AVX2__) && !defined(__AVX512F__)
    const __m128i halves = _mm256_cvtps_ph(bits_as<__m256>(values), _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to, &halves, sizeof(halves));
#else
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = narrow<T>(values[lane]);
#endif
  }
}

OMNI_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// The sum of all lanes, in an order that depends on the form alone.
OMNI_INLINE float sum_of(Floats vector) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const __m512 wide = bits_as<__m512>(vector);
  const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(wide), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(wide), upper);
#else
  const __m256 eight = bits_as<__m256>(vector);
#endif
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
  return (vector[0] + vector[2]) + (vector[1] + vector[3]);
#endif
}

// The sums of four vectors at once, into to[0..3].
OMNI_INLINE void store_sums(float* to, Floats a, Floats b, Floats c, Floats d) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  const auto halve = [](Floats vector) __attribute__((always_inline)) {
    const __m512 wide = bits_as<__m512>(vector);
    const __m256 upper = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(wide), 1));
    return _mm256_add_ps(_mm512_castps512_ps256(wide), upper);
  };
#else
  const auto halve = [](Floats vector) __attribute__((always_inline)) { return bits_as<__m256>(vector); };
#endif
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(halve(a), halve(b)), _mm256_hadd_ps(halve(c), halve(d)));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
#else
  to[0] = sum_of(a), to[1] = sum_of(b), to[2] = sum_of(c), to[3] = sum_of(d);
#endif
}

template <int... kLane>
OMNI_INLINE void interleave_lanes(Floats a, Floats b, Floats& lower, Floats& upper,
                                  std::integer_sequence<int, kLane...>) {
  constexpr int kHalf = kLanes / 2;
#if defined(__clang__)
  lower = __builtin_shufflevector(a, b, (kLane % 2 * kLanes + kLane / 2)...);
  upper = __builtin_shufflevector(a, b, (kLane % 2 * kLanes + kLane / 2 + kHalf)...);
#else
  lower = __builtin_shuffle(a, b, Ints{(kLane % 2 * kLanes + kLane / 2)...});
  upper = __builtin_shuffle(a, b, Ints{(kLane % 2 * kLanes + kLane / 2 + kHalf)...});
#endif
}

// a0 b0 a1 b1 …: the first half of them and the second.
OMNI_INLINE void interleave(Floats a, Floats b, Floats& lower, Floats& upper) {
  interleave_lanes(a, b, lower, upper, std::make_integer_sequence<int, kLanes>{});
}

// kLanes vectors as a square whose rows become its columns: each pass interleaves the two halves.
OMNI_INLINE void transpose(Floats (&square)[kLanes]) {
  for (int pass = 1; pass < kLanes; pass *= 2) {
    Floats next[kLanes];
    OMNI_UNROLL
    for (int row = 0; row < kLanes / 2; ++row)
      interleave(square[row], square[row + kLanes / 2], next[2 * row], next[2 * row + 1]);
    OMNI_UNROLL
    for (int row = 0; row < kLanes; ++row) square[row] = next[row];
  }
}

OMNI_INLINE float largest_of(Floats vector) {
  float result = vector[0];
  OMNI_UNROLL
  for (int lane = 1; lane < kLanes; ++lane) result = vector[lane] > result ? vector[lane] : result;
  return result;
}

// e^x to about two units in the last place; arguments are limited to [-87, 88], so the result is finite and positive.
OMNI_INLINE Floats exponential(Floats x) {
  x = x < splat(-87.0f) ? splat(-87.0f) : x;  // a NaN stays
  x = x > splat(88.0f) ? splat(88.0f) : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer lands in the low bits
  const Floats whole = shifted - 12582912.0f;
  const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  Floats series = splat(1.9875691500e-4f);
  series = series * rest + 1.3981999507e-3f;
  series = series * rest + 8.3334519073e-3f;
  series = series * rest + 4.1665795894e-2f;
  series = series * rest + 1.6666665459e-1f;
  series = series * rest + 5.0000001201e-1f;
  series = series * (rest * rest) + rest + 1.0f;
  const Words exponent = (bits_as<Words>(shifted) - bits_as<Words>(splat(12582912.0f))) << 23;
  return bits_as<Floats>(bits_as<Words>(series) + exponent);
}

}  // namespace omni
