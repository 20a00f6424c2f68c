// Absorbed MLA decode attention: all heads attend to one latent per token, so a group of heads reads it once.

#include "attention.h"
#include "matrix_unit.h"

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

  int64_t query_room(int64_t heads) const { return heads * query_size(); }
  void stage_queries(int64_t request, int64_t first_head, int64_t heads, Staged<T>* to) const {
    const auto* latent = static_cast<const T*>(problem.query_latent) + request * problem.query_latent_stride;
    const auto* rope = static_cast<const T*>(problem.query_rope) + request * problem.query_rope_stride;
    for (int64_t head = first_head; head < first_head + heads; ++head, to += query_size()) {
      stage<T>(latent + head * problem.query_latent_head_stride, problem.rank, to);
      stage<T>(rope + head * problem.query_rope_head_stride, problem.rope_dim, to + staged_size<T>(problem.rank));
    }
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

#if defined(__AMX_BF16__)
// The same by the matrix unit, 16 heads at a time. For their scores the latents are tiles as they lie; for their sums
// the elements of each two tokens are put side by side.
struct UnitLatentHeads : LatentHeads<BFloat16> {
  static constexpr int64_t up(int64_t size) { return (size + kUnitInputs - 1) / kUnitInputs * kUnitInputs; }

  int64_t latent_size() const { return up(problem.rank); }
  int64_t group_size() const { return kUnitRows * (latent_size() + up(problem.rope_dim)); }
  int64_t query_room(int64_t heads) const { return (heads + kUnitRows - 1) / kUnitRows * group_size(); }

  void stage_queries(int64_t request, int64_t first_head, int64_t heads, BFloat16* to) const {
    const auto* latent = static_cast<const BFloat16*>(problem.query_latent) + request * problem.query_latent_stride;
    const auto* rope = static_cast<const BFloat16*>(problem.query_rope) + request * problem.query_rope_stride;
    for (int64_t done = 0; done < heads; done += kUnitRows, to += group_size()) {
      const int64_t count = std::min(kUnitRows, heads - done), head = first_head + done;
      stage_for_unit(
          [&](int64_t each) OMNI_LAMBDA { return latent + (head + each) * problem.query_latent_head_stride; }, count,
          problem.rank, to);
      stage_for_unit([&](int64_t each) OMNI_LAMBDA { return rope + (head + each) * problem.query_rope_head_stride; },
                     count, problem.rope_dim, to + kUnitRows * latent_size());
    }
  }

  void scores(const BlockRows<BFloat16>& block, const BFloat16* query, int64_t heads, float* to) const {
    static thread_local Scratch scratch;
    auto* copies = scratch.reserve<BFloat16>(kBlock * (latent_size() + up(problem.rope_dim)));
    const TokenTiles latents(block, 0, problem.rank, copies);
    const TokenTiles ropes(block, 1, problem.rope_dim, copies + kBlock * latent_size());
    const int64_t tiles = (block.count + kUnitRows - 1) / kUnitRows;
    const MatrixUnit unit;
    for (int64_t first = 0; first < heads; first += kUnitRows, query += group_size()) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      latents.meet(query, latent_size(), tiles);
      ropes.meet(query + kUnitRows * latent_size(), up(problem.rope_dim), tiles);
      alignas(kLineBytes) UnitSums sums[kTiles];
      _tile_stored(0, sums[0], kUnitTileRow);
      _tile_stored(1, sums[1], kUnitTileRow);
      _tile_stored(2, sums[2], kUnitTileRow);
      _tile_stored(3, sums[3], kUnitTileRow);
      const int64_t count = std::min(kUnitRows, heads - first);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        Floats square[kLanes];
        OMNI_UNROLL
        for (int line = 0; line < kLanes; ++line) square[line] = load<Floats>(sums[tile] + line * kUnitRows);
        transpose(square);
        for (int64_t head = 0; head < count; ++head)
          store(to + (first + head) * kBlock + tile * kUnitRows, square[head]);
      }
    }
  }

  void add_values(const BlockRows<BFloat16>& block, const float* weights, int64_t heads, float* to,
                  int64_t to_stride) const {
    static thread_local Scratch scratch;
    auto* shares = scratch.reserve<BFloat16>(heads * kBlock + kTiles * kUnitTile);  // [heads, kBlock], rounded
    BFloat16* values = shares + heads * kBlock;
    for (int64_t at = 0; at < heads * kBlock; at += kLanes) store_unit(shares + at, load<Floats>(weights + at));
    const int64_t whole = heads / kUnitRows * kUnitRows;
    if (whole > 0) add_values_of(block, 0, whole, kUnitRows, shares, values, to, to_stride);
    if (whole < heads) add_values_of(block, whole, heads, heads - whole, shares, values, to, to_stride);
  }

 private:
  static constexpr int kTiles = kBlock / kUnitRows;
  static_assert(kTiles == 4);

  // A part of a block's tokens, 16 of which are a tile: where they lie, or copied where they lie otherwise.
  struct TokenTiles {
    const BFloat16* first[kTiles] = {};
    int64_t row_bytes[kTiles] = {};

    TokenTiles(const BlockRows<BFloat16>& block, int part, int64_t size, BFloat16* copies) {
      const int64_t padded = up(size);
      for (int64_t token = 0; token < block.count; token += kUnitRows) {
        const BFloat16* const* rows = block.parts[part] + token;
        const int64_t count = std::min(kUnitRows, block.count - token), apart = count > 1 ? rows[1] - rows[0] : 0;
        bool is_tile = padded == size && count == kUnitRows;
        for (int64_t row = 1; is_tile && row < count; ++row) is_tile = rows[row] - rows[0] == row * apart;
        if (!is_tile) {
          BFloat16* to = copies + token * padded;
          std::fill_n(to, kUnitRows * padded, BFloat16{});
          for (int64_t row = 0; row < count; ++row) std::memcpy(to + row * padded, rows[row], size * sizeof(BFloat16));
        }
        first[token / kUnitRows] = is_tile ? rows[0] : copies + token * padded;
        row_bytes[token / kUnitRows] = (is_tile ? apart : padded) * int64_t(sizeof(BFloat16));
      }
      __asm__ volatile("" ::"r"(copies) : "memory");
    }

    // Adds to the scores of 16 heads in tiles 0 to 3.
    OMNI_INLINE void meet(const BFloat16* query, int64_t size, int64_t tiles) const {
      for (int64_t at = 0; at < size; at += kUnitInputs) {
        _tile_loadd(6, query + at * kUnitRows, kUnitTileRow);
        _tile_loadd(4, first[0] + at, row_bytes[0]);
        _tile_dpbf16ps(0, 4, 6);
        if (tiles < 2) continue;
        _tile_loadd(5, first[1] + at, row_bytes[1]);
        _tile_dpbf16ps(1, 5, 6);
        if (tiles < 3) continue;
        _tile_loadd(4, first[2] + at, row_bytes[2]);
        _tile_dpbf16ps(2, 4, 6);
        if (tiles < 4) continue;
        _tile_loadd(5, first[3] + at, row_bytes[3]);
        _tile_dpbf16ps(3, 5, 6);
      }
    }
  };

  // The sums of heads [begin, end), `together` of which are a tile.
  void add_values_of(const BlockRows<BFloat16>& block, int64_t begin, int64_t end, int64_t together,
                     const BFloat16* shares, BFloat16* values, float* to, int64_t to_stride) const {
    constexpr int64_t kShareRow = kBlock * int64_t(sizeof(BFloat16));
    static_assert(kValueLanes == 2 * kUnitRows);
    const int64_t sums_row = to_stride * int64_t(sizeof(float)), tokens = up(block.count);
    const MatrixUnit unit(together);
    for (int64_t at = 0; at < problem.rank; at += kValueLanes) {
      const int64_t width = std::min(kValueLanes, problem.rank - at);
      const auto part_of = [&](int64_t token) { return token < block.count ? block.parts[0][token] + at : nullptr; };
      for (int64_t token = 0; token < tokens; token += 2)
        stage_unit_pair(part_of(token), part_of(token + 1), width,
                        values + token / kUnitInputs * 2 * kUnitTile + token % kUnitInputs * kUnitRows);
      __asm__ volatile("" ::"r"(shares), "r"(values), "r"(to) : "memory");
      for (int64_t head = begin; head < end; head += together) {
        float* sums = to + head * to_stride + at;
        const BFloat16* share = shares + head * kBlock;
        _tile_loadd(0, sums, sums_row);
        _tile_loadd(1, sums + kUnitRows, sums_row);
        _tile_loadd(4, share, kShareRow);
        _tile_loadd(6, values, kUnitTileRow);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, values + kUnitTile, kUnitTileRow);
        _tile_dpbf16ps(1, 4, 7);
        if (tokens > kUnitInputs) {
          _tile_loadd(5, share + kUnitInputs, kShareRow);
          _tile_loadd(6, values + 2 * kUnitTile, kUnitTileRow);
          _tile_dpbf16ps(0, 5, 6);
          _tile_loadd(7, values + 3 * kUnitTile, kUnitTileRow);
          _tile_dpbf16ps(1, 5, 7);
        }
        _tile_stored(0, sums, sums_row);
        _tile_stored(1, sums + kUnitRows, sums_row);
      }
    }
    __asm__ volatile("" ::"r"(to) : "memory");
  }
};
#endif

}  // namespace

void mla_decode_attention(const LatentAttention& problem) {
  with_element(problem.element, [&](auto element) {
    using T = decltype(element);
#if defined(__AMX_BF16__)
    if constexpr (kByMatrixUnit<T>) return attend<T>(UnitLatentHeads{{problem}}, problem);
#endif
    attend<T>(LatentHeads<T>{problem}, problem);
  });
}

}  // namespace omni
