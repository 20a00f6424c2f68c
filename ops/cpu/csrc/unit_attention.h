// Causal attention by the matrix unit: scores and outputs both lie keys or features first, so that a vector holds one
// of them for 16 queries, and the softmax never looks across a vector.
//
// Keys are a tile as they lie in memory. Queries are staged once per task; values are turned around once per task and
// block of keys. Blocks begin at multiples of kUnitKeys of the context, as those of the other form.
#pragma once

#include <algorithm>
#include <limits>

#include "matrix_unit.h"

namespace omni {

#if defined(__AMX_BF16__)

constexpr int64_t kUnitKeys = 64;  // of a block: the sums of four tiles
constexpr int64_t kUnitTilesOfKeys = kUnitKeys / kUnitRows;
constexpr float kNoScore = -std::numeric_limits<float>::max();
constexpr float kLog2E = 1.44269504f;

// 2^x for x <= 0, relative error below 3e-6; what is below -126 counts as that.
OMNI_INLINE Floats power_of_two(Floats x) {
  x = x < splat(-126.0f) ? splat(-126.0f) : x;  // a NaN stays
  const Floats shifted = x + 12582912.0f;       // 1.5 * 2^23: the nearest integer lands in the low bits
  const Floats rest = x - (shifted - 12582912.0f);
  Floats series = splat(1.3333558e-3f);
  series = series * rest + 9.6181291e-3f;
  series = series * rest + 5.5504109e-2f;
  series = series * rest + 2.4022651e-1f;
  series = series * rest + 6.9314718e-1f;
  series = series * rest + 1.0f;
  return bits_as<Floats>(bits_as<Words>(series) + (bits_as<Words>(shifted) << 23));
}

class UnitAttention {
 public:
  explicit UnitAttention(const CausalAttention& problem) : problem_(problem) {}

  void run(int64_t tokens_per_task) const {
    const int64_t parts = (problem_.queries + tokens_per_task - 1) / tokens_per_task;
    for_each_task(parts * problem_.kv_heads, [&](int64_t task) {
      // The last tokens see most, and are computed first: so the threads end together.
      const int64_t first = (parts - 1 - task / problem_.kv_heads) * tokens_per_task;
      Part{*this, task % problem_.kv_heads, first, std::min(tokens_per_task, problem_.queries - first)}.run();
    });
  }

 private:
  static constexpr int64_t up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

  const CausalAttention& problem_;
  int64_t group_ = problem_.heads / problem_.kv_heads, dim_ = problem_.dim, value_dim_ = problem_.value_dim;
  int64_t dims_ = up(dim_, kUnitInputs), values_ = up(value_dim_, kUnitRows);
  int64_t before_ = problem_.context - problem_.queries;

  // Some neighbouring tokens with the query heads of one KV head: a row is a token with a head.
  struct Part {
    const UnitAttention& of;
    int64_t kv_head, first_token, tokens;
    int64_t rows = tokens * of.group_, groups = up(rows, kUnitRows) / kUnitRows;
    BFloat16 *query = nullptr, *keys = nullptr, *values = nullptr;
    float* sums = nullptr;  // [groups][values_][16], and [groups] of the two below
    Floats *maxima = nullptr, *totals = nullptr;

    int64_t position(int64_t row) const { return of.before_ + first_token + std::min(row, rows - 1) / of.group_; }

    int64_t sees_from(int64_t at) const {
      return of.problem_.window < 0 ? 0 : std::max<int64_t>(at + 1 - of.problem_.window, 0);
    }

    void run() {
      static thread_local Scratch halves, floats;
      query = halves.reserve<BFloat16>(groups * kUnitRows * of.dims_ + kUnitKeys * (of.dims_ + of.values_));
      keys = query + groups * kUnitRows * of.dims_;
      values = keys + kUnitKeys * of.dims_;
      sums = floats.reserve<float>(groups * kUnitRows * (of.values_ + 2));
      maxima = reinterpret_cast<Floats*>(sums + groups * kUnitRows * of.values_);
      totals = maxima + groups;
      std::fill_n(sums, groups * kUnitRows * of.values_, 0.0f);
      std::fill_n(maxima, groups, splat(kNoScore));
      std::fill_n(totals, groups, Floats{});
      const CausalAttention& problem = of.problem_;
      const auto* from = static_cast<const BFloat16*>(problem.query) + first_token * problem.query_stride +
                         kv_head * of.group_ * problem.query_head_stride;
      for (int64_t row = 0; row < rows; row += kUnitRows)
        stage_for_unit(
            [&](int64_t each) OMNI_LAMBDA {
              return from + (row + each) / of.group_ * problem.query_stride +
                     (row + each) % of.group_ * problem.query_head_stride;
            },
            std::min(kUnitRows, rows - row), of.dim_, query + row * of.dims_);
      {
        const MatrixUnit unit;
        const int64_t end = position(rows - 1) + 1;
        for (int64_t block = sees_from(position(0)) / kUnitKeys * kUnitKeys; block < end; block += kUnitKeys)
          meet(block, std::min(kUnitKeys, end - block));
      }
      put_out();
    }

    // All rows with a block of keys and values.
    void meet(int64_t block, int64_t count) {
      const CausalAttention& problem = of.problem_;
      const auto* key =
          static_cast<const BFloat16*>(problem.key) + block * problem.key_stride + kv_head * problem.key_head_stride;
      int64_t key_stride = problem.key_stride;
      if (count < kUnitKeys || of.dims_ != of.dim_) {  // a tile reads whole steps of 16 keys
        for (int64_t row = 0; row < kUnitKeys; ++row) {
          BFloat16* to = keys + row * of.dims_;
          std::fill_n(to, of.dims_, BFloat16{});
          if (row < count) std::memcpy(to, key + row * key_stride, of.dim_ * sizeof(BFloat16));
        }
        key = keys;
        key_stride = of.dims_;
      }
      turn_values(static_cast<const BFloat16*>(problem.value) + block * problem.value_stride +
                      kv_head * problem.value_head_stride,
                  count);
      __asm__ volatile("" ::"r"(keys), "r"(values) : "memory");
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = position(group * kUnitRows), last = position(group * kUnitRows + kUnitRows - 1);
        if (block > last || block + count <= sees_from(first)) continue;
        alignas(kLineBytes) UnitSums scores[kUnitTilesOfKeys];
        alignas(kLineBytes) BFloat16 weights[kUnitKeys * kUnitRows];
        multiply_keys(key, key_stride, query + group * kUnitRows * of.dims_, scores);
        float* of_group = sums + group * kUnitRows * of.values_;
        const bool whole = block + kUnitKeys <= first + 1 && block >= sees_from(last);
        const Floats shrink = whole ? soften<false>(group, block, scores[0], weights)
                                    : soften<true>(group, block, scores[0], weights);
        if (!is_one(shrink))
          for (int64_t at = 0; at < of.values_; ++at)
            store(of_group + at * kUnitRows, load<Floats>(of_group + at * kUnitRows) * shrink);
        __asm__ volatile("" ::"r"(weights), "r"(of_group) : "memory");
        add_values(weights, of_group);
      }
    }

    // values[feature][key], zeros for missing keys.
    void turn_values(const BFloat16* from, int64_t count) const {
      for (int64_t at = 0; at < of.value_dim_; at += kUnitRows) {
        const int64_t width = std::min(kUnitRows, of.value_dim_ - at);
        for (int64_t key = 0; key < kUnitKeys; key += kUnitRows) {
          Floats square[kLanes];
          if (width == kUnitRows && key + kUnitRows <= count) {
            OMNI_UNROLL
            for (int row = 0; row < kLanes; ++row) square[row] = widen(from + (key + row) * of.problem_.value_stride + at);
          } else {
            for (int row = 0; row < kLanes; ++row) {
              BFloat16 padded[kUnitRows] = {};
              if (key + row < count)
                std::memcpy(padded, from + (key + row) * of.problem_.value_stride + at, width * sizeof(BFloat16));
              square[row] = widen(padded);
            }
          }
          transpose(square);
          OMNI_UNROLL
          for (int feature = 0; feature < kLanes; ++feature)
            store_rounded(values + (at + feature) * kUnitKeys + key, square[feature]);
        }
      }
    }

    // scores[key][query] of 16 queries.
    void multiply_keys(const BFloat16* key, int64_t key_stride, const BFloat16* queries, UnitSums* scores) const {
      const int64_t row_bytes = key_stride * int64_t(sizeof(BFloat16)), between = kUnitRows * key_stride;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t at = 0; at < of.dims_; at += kUnitInputs) {
        _tile_loadd(6, queries + at * kUnitRows, kUnitTileRow);
        _tile_loadd(4, key + at, row_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, key + between + at, row_bytes);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(4, key + 2 * between + at, row_bytes);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, key + 3 * between + at, row_bytes);
        _tile_dpbf16ps(3, 5, 6);
      }
      _tile_stored(0, scores[0], kUnitTileRow);
      _tile_stored(1, scores[1], kUnitTileRow);
      _tile_stored(2, scores[2], kUnitTileRow);
      _tile_stored(3, scores[3], kUnitTileRow);
    }

    // Turns scores into weights relative to the running maxima, rounded, two keys to a word; returns by how much earlier
    // sums shrink.
    template <bool kMasked>
    Floats soften(int64_t group, int64_t block, float* scores, BFloat16* weights) const {
      const Floats scale = splat(of.problem_.scale * kLog2E);
      Ints positions = {};
      if constexpr (kMasked)
        for (int lane = 0; lane < kLanes; ++lane) positions[lane] = int32_t(position(group * kUnitRows + lane) - block);
      const auto is_seen = [&](int key) OMNI_LAMBDA {  // keys behind the context are behind every query
        Ints seen = positions >= key;
        if (of.problem_.window >= 0) seen &= positions - int32_t(of.problem_.window) < key;
        return seen;
      };
      constexpr int kStep = 4;
      Floats largest[kStep];
      for (int each = 0; each < kStep; ++each) largest[each] = splat(kNoScore);
      for (int key = 0; key < kUnitKeys; key += kStep) {
        OMNI_UNROLL
        for (int each = 0; each < kStep; ++each) {
          Floats score = load<Floats>(scores + (key + each) * kUnitRows) * scale;
          if constexpr (kMasked) score = is_seen(key + each) ? score : splat(kNoScore);
          largest[each] = larger(score, largest[each]);
        }
      }
      const Floats maximum =
          larger(larger(larger(largest[0], largest[1]), larger(largest[2], largest[3])), maxima[group]);
      const Floats shrink = power_of_two(maxima[group] - maximum);
      maxima[group] = maximum;
      Floats total[2] = {};
      for (int key = 0; key < kUnitKeys; key += 2) {
        Floats pair[2];
        OMNI_UNROLL
        for (int each = 0; each < 2; ++each) {
          pair[each] = power_of_two(load<Floats>(scores + (key + each) * kUnitRows) * scale - maximum);
          if constexpr (kMasked) pair[each] = is_seen(key + each) ? pair[each] : Floats{};
          total[each] += pair[each];
        }
        store_unit_pairs(weights + key * kUnitRows, pair[0], pair[1]);
      }
      totals[group] = totals[group] * shrink + (total[0] + total[1]);
      return shrink;
    }

    static bool is_one(Floats values) {
      const Ints differs = values != splat(1.0f);
      int32_t any = 0;
      for (int lane = 0; lane < kLanes; ++lane) any |= differs[lane];
      return any == 0;
    }

    // to[feature][query] += values . weights
    void add_values(const BFloat16* weights, float* to) const {
      constexpr int64_t kRowBytes = kUnitKeys * int64_t(sizeof(BFloat16));
      _tile_loadd(6, weights, kUnitTileRow);
      _tile_loadd(7, weights + kUnitTile, kUnitTileRow);
      int64_t at = 0;
      for (; at + 2 * kUnitRows <= of.values_; at += 2 * kUnitRows) {
        float *first = to + at * kUnitRows, *second = first + kUnitRows * kUnitRows;
        const BFloat16 *from = values + at * kUnitKeys, *next = from + kUnitRows * kUnitKeys;
        _tile_loadd(0, first, kUnitTileRow);
        _tile_loadd(1, second, kUnitTileRow);
        _tile_loadd(4, from, kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, next, kRowBytes);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(4, from + kUnitInputs, kRowBytes);
        _tile_dpbf16ps(0, 4, 7);
        _tile_loadd(5, next + kUnitInputs, kRowBytes);
        _tile_dpbf16ps(1, 5, 7);
        _tile_stored(0, first, kUnitTileRow);
        _tile_stored(1, second, kUnitTileRow);
      }
      if (at < of.values_) {
        _tile_loadd(0, to + at * kUnitRows, kUnitTileRow);
        _tile_loadd(4, values + at * kUnitKeys, kRowBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, values + at * kUnitKeys + kUnitInputs, kRowBytes);
        _tile_dpbf16ps(0, 5, 7);
        _tile_stored(0, to + at * kUnitRows, kUnitTileRow);
      }
    }

    void put_out() const {
      auto* output = static_cast<BFloat16*>(of.problem_.output);
      for (int64_t group = 0; group < groups; ++group) {
        const Floats factor = 1.0f / totals[group];  // every token sees itself
        const int64_t count = std::min(kUnitRows, rows - group * kUnitRows);
        for (int64_t at = 0; at < of.values_; at += kUnitRows) {
          const int64_t width = std::min(kUnitRows, of.value_dim_ - at);
          Floats square[kLanes];
          OMNI_UNROLL
          for (int feature = 0; feature < kLanes; ++feature)
            square[feature] =
                load<Floats>(sums + (group * of.values_ + at + feature) * kUnitRows) * factor;
          transpose(square);
          for (int64_t each = 0; each < count; ++each) {
            const int64_t row = group * kUnitRows + each, token = first_token + row / of.group_;
            const int64_t head = kv_head * of.group_ + row % of.group_;
            BFloat16* to = output + (token * of.problem_.heads + head) * of.value_dim_ + at;
            BFloat16 rounded[kLanes];
            store_unit(rounded, square[each]);
            std::memcpy(to, rounded, width * sizeof(BFloat16));
          }
        }
      }
    }
  };
};

#endif

}  // namespace omni
