// Attention of a batch over paged slots, every shared run of slots read once. The C ABI is `attend`,
// below, and in plan.cpp; kernel.py is its other side.
//
// A run's slots are read in blocks of 64 tokens. A block's keys and values are packed once, then
// the queries of all heads of the KV head and of all sequences below the run are multiplied with
// it, a few rows at a time, and folded into their running softmax (maximum, sum, weighted values),
// which stays in memory: so the runs of a path need no partial results. Threads take equal parts of
// the batch's work; a query that several threads worked on is merged by log-sum-exp at the end.
// Slots lie scattered over a pool much larger than the caches, so the next block's rows are
// prefetched from inside the multiplications of this one.

#include <deque>

#include "part.h"

namespace {

constexpr int64_t TILE_ROWS = 512;  // rows of a KV head that one pass over an extend's keys serves

// Measured, in units of one row's work on one token: what a token costs per KV head apart from its
// rows (to fetch and pack it).
constexpr int64_t TOKEN_COST = 8;

// The queries [first, last) from all parts: Σ 2^(m_i - m) · values_i / Σ 2^(m_i - m) · sum_i.
void merge(const Call& c, const Sizes& z, const std::vector<Part>& parts, int64_t first,
           int64_t last, float* row) {
  for (int64_t query = first; query < last; query++) {
    const int64_t token = c.query_token[query];
    for (int64_t h = 0; h < c.q_heads; h++) {
      const auto index = [&](const Part& part) {
        const int64_t queries = part.last - part.first;
        return ((h / z.group) * queries + query - part.first) * z.group + h % z.group;
      };
      const auto has = [&](const Part& part) {
        return part.first <= query && query < part.last && part.sum[index(part)] > 0.f;
      };
      float top = LOWEST, sum = 0.f;
      for (const Part& part : parts)
        if (has(part)) top = std::max(top, part.maximum[index(part)]);
      std::fill(row, row + z.v_padded, 0.f);
      for (const Part& part : parts) {
        if (!has(part)) continue;
        const int64_t i = index(part);
        const float weight = std::exp2(part.maximum[i] - top);
        sum += weight * part.sum[i];
        const float* from = part.values + i * z.v_padded;
        for (int64_t d = 0; d < z.v_padded; d += LANES)
          store(row + d, load(row + d) + load(from + d) * weight);
      }
      const float share = sum > 0.f ? 1.f / sum : 0.f;
      const int64_t at = token * c.out_token + h * c.out_head;
      if (c.q_dtype == FLOAT32) {
        float* to = static_cast<float*>(c.out) + at;
        for (int64_t d = 0; d < c.v_dim; d++) to[d] = row[d] * share;
      } else {
        uint16_t* to = static_cast<uint16_t*>(c.out) + at;
        for (int64_t d = 0; d < c.v_dim; d++) to[d] = as_bfloat16(row[d] * share);
      }
    }
  }
}

std::vector<Item> items_of(const Call& c, const Sizes& z) {
  std::vector<Item> items;
  const Run* runs = reinterpret_cast<const Run*>(c.runs);
  const int64_t tile = std::max<int64_t>(1, TILE_ROWS / z.group);
  for (int64_t i = 0; i < c.n_runs; i++) {
    const Run& run = runs[i];
    const int64_t first = c.first_query[run.first], last = c.first_query[run.last + 1];
    for (int64_t from = first; from < last; from += tile) {
      const int64_t to = std::min(from + tile, last);
      int64_t lowest = c.query_position[from], highest = lowest;
      for (int64_t query = from; query < to; query++) {
        lowest = std::min(lowest, c.query_position[query]);
        highest = std::max(highest, c.query_position[query]);
      }
      int64_t begin = run.begin, end = highest + 1;
      if (run.end >= 0) end = std::min<int64_t>(end, run.end);
      if (c.window >= 0) begin = std::max(begin, lowest - c.window);
      if (begin < end) items.push_back({run.row, begin, end, from, to, lowest, highest});
    }
  }
  return items;
}

int64_t cost_of(const Call& c, const Item& item) {
  return (item.end - item.begin) *
         (TOKEN_COST * c.kv_heads + (item.last - item.first) * c.q_heads);
}

// Equal parts of the work in its order, cut between blocks.
std::vector<std::vector<Item>> split(const Call& c, const std::vector<Item>& items, int64_t parts) {
  int64_t whole = 0;
  for (const Item& item : items) whole += cost_of(c, item);
  std::vector<std::vector<Item>> split_items(parts);
  int64_t before = 0, part = 0;
  for (const Item& item : items) {
    const int64_t cost = cost_of(c, item);
    int64_t begin = item.begin;
    while (begin < item.end) {
      int64_t end = item.end;
      if (part + 1 < parts) {
        const double limit = static_cast<double>(whole) * (part + 1) / parts;
        const double share = std::min(1.0, std::max(0.0, (limit - before) / cost));
        const int64_t blocks = std::llround(share * (item.end - item.begin) / BLOCK);
        if (before + cost > limit) end = std::min(end, item.begin + blocks * BLOCK);
      }
      if (end > begin) {
        split_items[part].push_back(item);
        split_items[part].back().begin = begin;
        split_items[part].back().end = end;
      }
      if (end < item.end) part++;
      begin = std::max(begin, end);
    }
    before += cost;
  }
  return split_items;
}

// One for each part, not for each thread: OpenMP may give fewer threads than were asked for.
std::deque<Scratch>& scratch_of_caller(int64_t parts) {
  static thread_local std::deque<Scratch> scratch;
  while (static_cast<int64_t>(scratch.size()) < parts) scratch.emplace_back();
  return scratch;
}

}  // namespace

extern "C" {

// Attention of the whole batch. Returns 0, or 1 if there is no memory for it.
int attend(const Call* call) {
  const Call& c = *call;
  const int64_t group = c.q_heads / c.kv_heads;
  bool pairs = false;
#ifdef __AVX512BF16__
  pairs = c.q_dtype == BFLOAT16 && c.kv_dtype == BFLOAT16;
#endif
  const Sizes z{group, pairs ? (c.dim + 1) / 2 : c.dim, up(c.v_dim, LANES)};
  const std::vector<Item> items = items_of(c, z);
  const int64_t threads = std::max<int64_t>(1, c.threads);
  const std::vector<std::vector<Item>> parts_items = split(c, items, threads);
  std::vector<Part> parts(threads);
  std::deque<Scratch>& scratch = scratch_of_caller(threads);
  std::vector<std::vector<float>> rows(threads, std::vector<float>(z.v_padded));
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int64_t t = 0; t < threads; t++)
    run_part(c, z, parts_items[t], parts[t], scratch[t]);
  for (const Part& part : parts)
    if (part.failed) return 1;
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int64_t t = 0; t < threads; t++)
    merge(c, z, parts, c.n_queries * t / threads, c.n_queries * (t + 1) / threads, rows[t].data());
  for (Scratch& used : scratch) used.trim();
  return 0;
}

}  // extern "C"
