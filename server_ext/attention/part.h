// One thread's part of a call.

#pragma once

#include <cstdlib>
#include <vector>

#include "pack.h"
#include "softmax.h"

namespace {

// Aligned scratch that only grows while calls are alike; large ones are given back.
struct Scratch {
  float* at = nullptr;
  size_t bytes = 0;
  float* need(size_t floats) {
    const size_t want = up(floats * 4, 64);
    if (want > bytes) {
      std::free(at);
      at = static_cast<float*>(std::aligned_alloc(64, want));
      bytes = at ? want : 0;
    }
    return at;
  }
  void trim() {
    if (bytes > (64u << 20)) {
      std::free(at);
      at = nullptr;
      bytes = 0;
    }
  }
  ~Scratch() { std::free(at); }
};

// The running softmax of the queries [first, last) as one thread has it.
struct Part {
  int64_t first = 0, last = 0;
  float* values = nullptr;   // [kv_heads][queries][group][v_padded], not divided by the sum
  float* maximum = nullptr;  // [kv_heads][queries][group], in powers of two
  float* sum = nullptr;
  float* q = nullptr;  // [kv_heads][queries][group][q_padded elements]
  bool failed = false;
};

struct Sizes {
  int64_t group, q_elements, v_padded;
};

template <class Kind>
void pack_queries(const Call& c, const Sizes& z, Part& part) {
  const int64_t queries = part.last - part.first;
  for (int64_t i = 0; i < queries; i++) {
    const int64_t token = c.query_token[part.first + i];
    for (int64_t h = 0; h < c.q_heads; h++) {
      const int64_t row = ((h / z.group) * queries + i) * z.group + h % z.group;
      float* to = part.q + row * z.q_elements;
      const int64_t at = token * c.q_token + h * c.q_head;
      if constexpr (Kind::WIDTH == 2) {  // the queries are bfloat16 then
        to[z.q_elements - 1] = 0.f;
        std::memcpy(to, static_cast<const uint16_t*>(c.q) + at, c.dim * 2);
      } else if (c.q_dtype == FLOAT32) {
        std::memcpy(to, static_cast<const float*>(c.q) + at, c.dim * 4);
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(c.q) + at;
        for (int64_t d = 0; d < c.dim; d++) to[d] = as_float(from[d]);
      }
    }
  }
}

template <class Kind, class Number>
struct Worker {
  const Call& c;
  const Sizes& z;
  Part& part;
  float *keys, *values, *scores;
  float scale, cap;
  Rows value_rows{};  // of this block, while they are not packed

  // One block's keys and values, packed, for the rows [from, from + ROWS) of a KV head. `all`: every
  // key is visible to every row.
  template <int ROWS>
  void rows(int64_t h, int64_t from, int64_t begin, int n, bool all, Prefetch& next) {
    const int64_t queries = part.last - part.first;
    const int64_t base = h * queries * z.group + from;
    int low[ROWS], high[ROWS];
    if (!all) {
      bool any = false;
      for (int r = 0; r < ROWS; r++) {
        const int64_t position = c.query_position[part.first + (from + r) / z.group];
        const int64_t oldest = c.window < 0 ? 0 : position - c.window;
        high[r] = static_cast<int>(std::clamp<int64_t>(position + 1 - begin, 0, n));
        low[r] = static_cast<int>(std::clamp<int64_t>(oldest - begin, 0, n));
        any |= low[r] < high[r];
      }
      if (!any) return;
    }
    const int64_t padded = up(n, LANES);
    const int vectors = static_cast<int>(padded / LANES);
    tiles<Kind, ROWS>(keys, BLOCK, part.q + base * z.q_elements, z.q_elements, z.q_elements,
                      scores, BLOCK, nullptr, padded, next);
    float rescale[ROWS];
    for (int r = 0; r < ROWS; r++) {
      next.step(16);
      float* row = scores + r * BLOCK;
      if (!all && low[r] >= high[r]) {
        rescale[r] = 1.f;
        std::memset(row, 0, BLOCK * 4);
        continue;
      }
      if (cap != 0.f) cap_scores(row, vectors, scale, cap);
      if (!all || padded != n) hide_scores(row, vectors, all ? 0 : low[r], all ? n : high[r]);
      constexpr int FULL = BLOCK / LANES;
      const float to_powers = cap != 0.f ? 1.f : scale;
      float &maximum = part.maximum[base + r], &sum = part.sum[base + r];
      rescale[r] = vectors == FULL ? softmax<Kind, FULL>(row, FULL, to_powers, maximum, sum)
                                   : softmax<Kind, 0>(row, vectors, to_powers, maximum, sum);
    }
    if (value_rows.n) {  // as late as that, so that they have come from memory
      pack_values<Kind, Number>(value_rows, static_cast<int>(c.v_dim),
                                static_cast<int>(z.v_padded), values);
      value_rows.n = 0;
    }
    tiles<Kind, ROWS>(values, z.v_padded, scores, BLOCK, (n + Kind::WIDTH - 1) / Kind::WIDTH,
                      part.values + base * z.v_padded, z.v_padded, rescale, z.v_padded, next);
  }

  void all_rows(const Item& item, int64_t h, int64_t begin, int n, Prefetch& next) {
    const int64_t first = (item.first - part.first) * z.group;
    const int64_t count = (item.last - item.first) * z.group;
    const int64_t steps = (count + MAX_ROWS - 1) / MAX_ROWS;
    const bool all = begin + n - 1 <= item.lowest &&
                     (c.window < 0 || begin >= item.highest - c.window);
    for (int64_t i = 0; i < steps; i++) {
      const int64_t from = first + count * i / steps, to = first + count * (i + 1) / steps;
      switch (to - from) {
#define ROWS_CASE(N) \
  case N: \
    if constexpr (N <= MAX_ROWS) \
      rows<N>(h, from, begin, n, all, next); \
    break
        ROWS_CASE(1);
        ROWS_CASE(2);
        ROWS_CASE(3);
        ROWS_CASE(4);
        ROWS_CASE(5);
        ROWS_CASE(6);
        ROWS_CASE(7);
#undef ROWS_CASE
      }
    }
  }

  int slots_of(const Item& item, int64_t begin, int64_t* slots) const {
    const int n = static_cast<int>(std::min<int64_t>(BLOCK, item.end - begin));
    const int32_t* from = c.table + item.row * c.table_stride + begin;
    for (int i = 0; i < n; i++) {
      int64_t slot = from[i];
      if (c.slot_map) slot = c.slot_map[slot];
      slots[i] = slot < 0 ? 0 : slot;  // a hidden token of a sliding window has none
    }
    return n;
  }

  Rows rows_of(const void* pool, int64_t slot, int64_t head, int64_t h, const int64_t* slots,
               int n) const {
    const char* base = static_cast<const char*>(pool) + h * head * sizeof(Number);
    return {base, slot * static_cast<int64_t>(sizeof(Number)), slots, n};
  }

  void work(const std::vector<Item>& items) {
    Prefetch next(c, items);
    next.read(0, items[0].end - items[0].begin < BLOCK ? items[0].end - items[0].begin : BLOCK);
    int64_t slots[BLOCK];
    for (size_t i = 0; i < items.size(); i++) {
      const Item& item = items[i];
      for (int64_t begin = item.begin; begin < item.end; begin += BLOCK) {
        const int n = slots_of(item, begin, slots);
        const int64_t left = item.end - begin - BLOCK;
        const int64_t after =
            left > 0 ? left : i + 1 < items.size() ? items[i + 1].end - items[i + 1].begin : 0;
        for (int64_t h = 0; h < c.kv_heads; h++) {
          pack_keys<Kind, Number>(rows_of(c.k, c.k_slot, c.k_head, h, slots, n),
                                  static_cast<int>(c.dim), keys);
          value_rows = rows_of(c.v, c.v_slot, c.v_head, h, slots, n);
          all_rows(item, h, begin, n, next);
          if ((h + 1) % next.heads() == 0 || h + 1 == c.kv_heads)
            next.read(n, h + 1 < c.kv_heads ? n : std::min<int64_t>(BLOCK, after));
        }
      }
    }
  }
};

template <class Kind, class Number>
void do_part(const Call& c, const Sizes& z, const std::vector<Item>& items, Part& part,
             Scratch& scratch) {
  part.first = part.last = 0;
  if (items.empty()) return;
  part.first = items[0].first;
  for (const Item& item : items) {
    part.first = std::min(part.first, item.first);
    part.last = std::max(part.last, item.last);
  }
  const int64_t rows = (part.last - part.first) * c.q_heads;
  const int64_t values = up(rows * z.v_padded, 16), state = up(rows, 16);
  const int64_t q = up(rows * z.q_elements, 16);
  const int64_t packed_keys = z.q_elements * BLOCK, packed_values = BLOCK * up(z.v_padded, 32);
  float* at = scratch.need(values + 2 * state + q + packed_keys + packed_values + 8 * BLOCK);
  if (!at) {
    part.failed = true;
    return;
  }
  part.values = at;
  part.maximum = part.values + values;
  part.sum = part.maximum + state;
  part.q = part.sum + state;
  std::memset(part.values, 0, values * 4);
  std::fill(part.maximum, part.maximum + rows, LOWEST);
  std::memset(part.sum, 0, rows * 4);
  pack_queries<Kind>(c, z, part);
  float* keys = part.q + q;
  const float scale = c.cap != 0.f ? c.scale / c.cap : c.scale * LOG2E;
  Worker<Kind, Number> worker{c,    z,
                      part, keys, keys + packed_keys, keys + packed_keys + packed_values,
                      scale, c.cap * LOG2E};
  worker.work(items);
}

void run_part(const Call& c, const Sizes& z, const std::vector<Item>& items, Part& part,
              Scratch& scratch) {
  if (c.kv_dtype == FLOAT32) return do_part<Floats, float>(c, z, items, part, scratch);
#ifdef __AVX512BF16__
  if (c.q_dtype == BFLOAT16) return do_part<Pairs, uint16_t>(c, z, items, part, scratch);
#endif
  do_part<Floats, uint16_t>(c, z, items, part, scratch);
}

}  // namespace
