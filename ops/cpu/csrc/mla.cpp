// Absorbed MLA decode attention: all heads attend to one latent per token, so a group of heads reads it once.

#include "attention.h"

namespace omni {
namespace {

constexpr int64_t kUnitHeads = 8;  // that read a block together; with 16 heads, two tasks keep two threads busy

// A few neighbouring elements of a block of latents, put side by side as the multiplication takes them: all heads of
// the unit then read them from there. Without that, latents of a power of two in size fall onto the same cache lines.
template <class T>
struct LatentPart {
  alignas(kLineBytes) float values[kBlock * kValueLanes];
  int64_t count;

  LatentPart(const T* const* rows, int64_t row_count, int64_t at, int64_t rank) : count(row_count) {
    const int64_t width = std::min(kValueLanes, rank - at);
    for (int64_t row = 0; row < count; ++row) {
      float* to = values + row * kValueLanes;
      if (width == kValueLanes) {
        store(to, widen(rows[row] + at));
        store(to + kLanes, widen(rows[row] + at + kLanes));
      } else {
        for (int64_t index = 0; index < kValueLanes; ++index)
          to[index] = index < width ? to_float(rows[row][at + index]) : 0.0f;
      }
    }
  }

  void add(const float* weights, int64_t heads, float* to, int64_t to_stride) const {
    const auto row_at = [&](int64_t row) __attribute__((always_inline)) { return values + row * kValueLanes; };
    int64_t head = 0;
    for (; head + 4 <= heads; head += 4)
      weighted_tile<4, 2>(row_at, count, weights + head * kBlock, kBlock, to + head * to_stride, to_stride);
    for (; head < heads; ++head)
      weighted_tile<1, 2>(row_at, count, weights + head * kBlock, kBlock, to + head * to_stride, to_stride);
  }
};

#if defined(__AVX512BF16__)
// Pairs of tokens: one instruction multiplies and adds the elements of two. Weights are rounded to bfloat16, as the
// plain body does.
template <>
struct LatentPart<BFloat16> {
  static constexpr int64_t kPairs = kBlock / 2;
  alignas(kLineBytes) BFloat16 values[kPairs * 2 * kValueLanes];
  int64_t pairs;

  LatentPart(const BFloat16* const* rows, int64_t count, int64_t at, int64_t rank) : pairs((count + 1) / 2) {
    const int64_t width = std::min(kValueLanes, rank - at);
    alignas(kLineBytes) uint16_t order[2][kValueLanes];  // first of row 0, first of row 1, second of row 0, …
    for (int index = 0; index < kValueLanes; ++index) {
      order[0][index] = uint16_t(index / 2 + index % 2 * kValueLanes);
      order[1][index] = uint16_t(order[0][index] + kLanes);
    }
    const __m512i lower = _mm512_loadu_si512(order[0]), upper = _mm512_loadu_si512(order[1]);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      BFloat16 padded[2][kValueLanes] = {};
      const BFloat16* from[2] = {padded[0], padded[1]};
      for (int64_t row = 2 * pair; row < std::min(2 * pair + 2, count); ++row) {
        if (width == kValueLanes) {
          from[row % 2] = rows[row] + at;
        } else {
          std::memcpy(padded[row % 2], rows[row] + at, width * sizeof(BFloat16));
        }
      }
      const __m512i first = _mm512_loadu_si512(from[0]), second = _mm512_loadu_si512(from[1]);
      BFloat16* to = values + pair * 2 * kValueLanes;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(first, lower, second));
      _mm512_storeu_si512(to + kValueLanes, _mm512_permutex2var_epi16(first, upper, second));
    }
  }

  template <int kHeads>
  void add_heads(const uint32_t* weights, float* to, int64_t to_stride) const {
    Floats sums[kHeads][2];
    OMNI_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      sums[h][0] = load<Floats>(to + h * to_stride);
      sums[h][1] = load<Floats>(to + h * to_stride + kLanes);
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const __m512i lower = _mm512_loadu_si512(values + pair * 2 * kValueLanes);
      const __m512i upper = _mm512_loadu_si512(values + (pair * 2 + 1) * kValueLanes);
      OMNI_UNROLL
      for (int h = 0; h < kHeads; ++h) {
        const __m512i weight = _mm512_set1_epi32(int(weights[h * kPairs + pair]));
        sums[h][0] = (Floats)_mm512_dpbf16_ps((__m512)sums[h][0], (__m512bh)lower, (__m512bh)weight);
        sums[h][1] = (Floats)_mm512_dpbf16_ps((__m512)sums[h][1], (__m512bh)upper, (__m512bh)weight);
      }
    }
    OMNI_UNROLL
    for (int h = 0; h < kHeads; ++h) {
      store(to + h * to_stride, sums[h][0]);
      store(to + h * to_stride + kLanes, sums[h][1]);
    }
  }

  // `weights`: rounded, two tokens to a word.
  void add(const uint32_t* weights, int64_t heads, float* to, int64_t to_stride) const {
    int64_t head = 0;
    for (; head + 8 <= heads; head += 8) add_heads<8>(weights + head * kPairs, to + head * to_stride, to_stride);
    for (; head + 4 <= heads; head += 4) add_heads<4>(weights + head * kPairs, to + head * to_stride, to_stride);
    for (; head < heads; ++head) add_heads<1>(weights + head * kPairs, to + head * to_stride, to_stride);
  }
};
#endif

// The weights of a block as `LatentPart` takes them.
template <class T>
struct BlockWeights {
  const float* values;
  BlockWeights(const float* weights, int64_t, int64_t) : values(weights) {}
};

#if defined(__AVX512BF16__)
template <>
struct BlockWeights<BFloat16> {
  uint32_t values[kUnitHeads * kBlock / 2];

  BlockWeights(const float* weights, int64_t count, int64_t heads) {
    for (int64_t head = 0; head < heads; ++head) {
      const float* from = weights + head * kBlock;
      for (int64_t pair = 0; pair < (count + 1) / 2; ++pair) {
        const uint32_t second = 2 * pair + 1 < count ? narrow<BFloat16>(from[2 * pair + 1]).bits : 0;
        values[head * kBlock / 2 + pair] = narrow<BFloat16>(from[2 * pair]).bits | second << 16;
      }
    }
  }
};
#endif

template <class T>
struct LatentHeads {
  const LatentAttention& problem;

  static constexpr int64_t span() { return 256; }  // a token is more work here than a token of one KV head
  int64_t units() const { return (problem.heads + kUnitHeads - 1) / kUnitHeads; }
  int64_t heads_of_unit() const { return std::min(kUnitHeads, problem.heads); }
  int64_t query_size() const { return staged_size<T>(problem.rank) + staged_size<T>(problem.rope_dim); }
  int64_t value_size() const { return problem.rank; }
  int64_t begin(int64_t) const { return 0; }

  void stage_query(int64_t request, int64_t head, Staged<T>* to) const {
    const auto* latent = static_cast<const T*>(problem.query_latent);
    const auto* rope = static_cast<const T*>(problem.query_rope);
    stage<T>(latent + request * problem.query_latent_stride + head * problem.query_latent_head_stride, problem.rank,
             to);
    stage<T>(rope + request * problem.query_rope_stride + head * problem.query_rope_head_stride, problem.rope_dim,
             to + staged_size<T>(problem.rank));
  }

  void locate(const Pages& pages, int64_t, int64_t token, BlockRows<T>& rows) const {
    pages.rows<T>(problem.latent, 0, token, rows.count, rows.parts[0]);
    pages.rows<T>(problem.rope_key, 0, token, rows.count, rows.parts[1]);
  }

  void scores(const BlockRows<T>& block, const Staged<T>* query, int64_t heads, float* to) const {
    const Staged<T>* rope = query + staged_size<T>(problem.rank);
    float rope_scores[kBlock * kUnitHeads];
    for (int64_t first = 0; first < heads; first += kUnitHeads) {
      const int64_t count = std::min(kUnitHeads, heads - first);
      float* of_unit = to + first * kBlock;
      dot_rows(block, 0, query + first * query_size(), count, problem.rank, of_unit);
      dot_rows(block, 1, rope + first * query_size(), count, problem.rope_dim, rope_scores);
      for (int64_t head = 0; head < count; ++head)
        for (int64_t index = head * kBlock; index < head * kBlock + block.count; ++index)
          of_unit[index] += rope_scores[index];
    }
  }

  void add_values(const BlockRows<T>& block, const float* weights, int64_t heads, float* to, int64_t to_stride) const {
    for (int64_t first = 0; first < heads; first += kUnitHeads) {
      const int64_t count = std::min(kUnitHeads, heads - first);
      const BlockWeights<T> shares(weights + first * kBlock, block.count, count);
      for (int64_t at = 0; at < problem.rank; at += kValueLanes) {
        LatentPart<T>(block.parts[0], block.count, at, problem.rank)
            .add(shares.values, count, to + first * to_stride + at, to_stride);
      }
    }
  }

 private:
  // scores[head * kBlock + token] = a part of the token . the same part of the query of `heads` heads
  void dot_rows(const BlockRows<T>& block, int part, const Staged<T>* query, int64_t heads, int64_t size,
                float* scores) const {
    block.template for_each_spread<kTileRows>([&](int64_t token, int64_t apart, auto height) OMNI_LAMBDA {
      const T* rows[height.value];
      for (int row = 0; row < height.value; ++row) rows[row] = block.parts[part][token + row * apart];
      dot_columns<T, height.value>(rows, query, query_size(), heads, size, scores + token, kBlock, apart);
    });
  }
};

}  // namespace

void mla_decode_attention(const LatentAttention& problem) {
  with_element(problem.element, [&](auto element) {
    using T = decltype(element);
    attend<T>(LatentHeads<T>{problem}, problem);
  });
}

}  // namespace omni
