// What is done to one token after another, between the products: norms, gated activation, rotation, and the copies into
// a cache. Each of these is one pass over memory, where the plain body takes one per operator.

#include <cmath>
#include <cstring>

#include "tiles.h"

namespace omni {
namespace {

constexpr int64_t kElementsPerTask = 1 << 14;

// body(first, last) for ranges of rows of `size` elements each.
template <class Body>
void for_each_range(int64_t rows, int64_t size, const Body& body) {
  const int64_t per_task = std::max<int64_t>(kElementsPerTask / std::max<int64_t>(size, 1), 1);
  for_each_task((rows + per_task - 1) / per_task,
                [&](int64_t task) { body(task * per_task, std::min(rows, (task + 1) * per_task)); });
}

// Function(first element, how many of it there are) for a row, a vector at a time.
template <class Function>
OMNI_INLINE void for_each_vector(int64_t size, const Function& function) {
  int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) function(at, int64_t(kLanes));
  if (at < size) function(at, size - at);
}

// Zeros stand for what is not there.
template <class T>
OMNI_INLINE Floats load_some(const T* from, int64_t count) {
  if (count == kLanes) return widen(from);
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return widen(padded);
}

template <class T>
OMNI_INLINE void store_some(Floats rounded_values, int64_t count, T* to) {
  if (count == kLanes) return store_rounded(to, rounded_values);
  T padded[kLanes];
  store_rounded(padded, rounded_values);
  std::memcpy(to, padded, count * sizeof(T));
}

template <class T>
void norm_rows(const RmsNorm& problem) {
  const int64_t dim = problem.dim;
  const auto* weight = static_cast<const T*>(problem.weight);
  for_each_range(problem.tokens * problem.heads, dim, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const int64_t token = index / problem.heads, head = index % problem.heads;
      const T* row = static_cast<const T*>(problem.hidden) + token * problem.stride + head * problem.head_stride;
      Floats squares = {};
      if (problem.residual != nullptr) {
        const T* residual = static_cast<const T*>(problem.residual) + token * problem.residual_stride;
        T* sum = static_cast<T*>(problem.sum) + index * dim;
        for_each_vector(dim, [&](int64_t at, int64_t count) OMNI_LAMBDA {
          const Floats total = rounded<T>(load_some(row + at, count) + load_some(residual + at, count));
          store_some<T>(total, count, sum + at);
          squares += total * total;
        });
        row = sum;
      } else {
        for_each_vector(dim, [&](int64_t at, int64_t count) OMNI_LAMBDA {
          const Floats values = load_some(row + at, count);
          squares += values * values;
        });
      }
      const float factor = 1.0f / std::sqrt(sum_of(squares) / float(dim) + problem.epsilon);
      T* output = static_cast<T*>(problem.output) + index * dim;
      for_each_vector(dim, [&](int64_t at, int64_t count) OMNI_LAMBDA {
        const Floats normalised = rounded<T>(load_some(row + at, count) * factor);
        store_some<T>(rounded<T>(normalised * load_some(weight + at, count)), count, output + at);
      });
    }
  });
}

template <class T>
void gate_rows(const SwiGlu& problem) {
  const int64_t size = problem.size;
  for_each_range(problem.rows, size, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      const T* gate = static_cast<const T*>(problem.gate_up) + index * problem.stride;
      const T* up = gate + size;
      T* output = static_cast<T*>(problem.output) + index * size;
      for_each_vector(size, [&](int64_t at, int64_t count) OMNI_LAMBDA {
        const Floats value = load_some(gate + at, count);
        const Floats activated = rounded<T>(value / (exponential(-value) + 1.0f));
        store_some<T>(rounded<T>(activated * load_some(up + at, count)), count, output + at);
      });
    }
  });
}

// `count` pairs of neighbours, taken apart.
template <class T>
OMNI_INLINE void load_pairs(const T* from, int64_t count, Floats& first, Floats& second) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (count == kLanes) {
      const Words words = load<Words>(from);
      first = bits_as<Floats>(words << 16);
      second = bits_as<Floats>(words & 0xffff0000u);
      return;
    }
  }
  float values[2][kLanes] = {};
  for (int64_t pair = 0; pair < count; ++pair) {
    values[0][pair] = to_float(from[2 * pair]);
    values[1][pair] = to_float(from[2 * pair + 1]);
  }
  first = load<Floats>(values[0]);
  second = load<Floats>(values[1]);
}

template <class T>
void rotate_rows(const Rotation& problem) {
  const int64_t dim = problem.dim, pairs = problem.pairs;
  for_each_range(problem.tokens, problem.heads * dim, [&](int64_t first, int64_t last) {
    for (int64_t index = first * problem.heads; index < last * problem.heads; ++index) {
      const int64_t token = index / problem.heads, head = index % problem.heads;
      const T* row = static_cast<const T*>(problem.input) + token * problem.stride + head * problem.head_stride;
      const float* cosines = problem.cos + token * problem.angle_stride;
      const float* sines = problem.sin + token * problem.angle_stride;
      T* output = static_cast<T*>(problem.output) + index * dim;
      for_each_vector(pairs, [&](int64_t at, int64_t count) OMNI_LAMBDA {
        Floats a, b;
        if (problem.interleaved) {
          load_pairs(row + 2 * at, count, a, b);
        } else {
          a = load_some(row + at, count);
          b = load_some(row + pairs + at, count);
        }
        const Floats cos = load_some(cosines + at, count), sin = load_some(sines + at, count);
        store_some<T>(rounded<T>(a * cos - b * sin), count, output + at);
        store_some<T>(rounded<T>(b * cos + a * sin), count, output + pairs + at);
      });
      std::memcpy(output + 2 * pairs, row + 2 * pairs, (dim - 2 * pairs) * sizeof(T));
    }
  });
}

template <class T>
void copy_rows(const CacheRows& problem) {
  const int64_t dim = problem.dim;
  const bool in_one = problem.head_stride == dim && problem.cache.head_stride == dim;
  for_each_range(problem.tokens, problem.heads * dim, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const int64_t slot = problem.slots[token];
      const T* from = static_cast<const T*>(problem.rows) + token * problem.stride;
      T* to = static_cast<T*>(const_cast<void*>(problem.cache.data)) +
              slot / problem.block_size * problem.cache.block_stride +
              slot % problem.block_size * problem.cache.token_stride;
      if (in_one) {
        std::memcpy(to, from, problem.heads * dim * sizeof(T));
      } else {
        for (int64_t head = 0; head < problem.heads; ++head)
          std::memcpy(to + head * problem.cache.head_stride, from + head * problem.head_stride, dim * sizeof(T));
      }
    }
  });
}

}  // namespace

void rms_norm(const RmsNorm& problem) {
  with_element(problem.element, [&](auto element) { norm_rows<decltype(element)>(problem); });
}

void swiglu(const SwiGlu& problem) {
  with_element(problem.element, [&](auto element) { gate_rows<decltype(element)>(problem); });
}

void rotate(const Rotation& problem) {
  with_element(problem.element, [&](auto element) { rotate_rows<decltype(element)>(problem); });
}

void write_cache(const CacheRows& problem) {
  with_element(problem.element, [&](auto element) { copy_rows<decltype(element)>(problem); });
}

}  // namespace omni
