// Fetches the rows of coming blocks from memory while the present one is worked on.

#pragma once

#include <algorithm>
#include <vector>

#include "work.h"

namespace {

// Goes through the work's rows in the order in which they will be read, a cache line at a step. Steps
// are in the products alone: packing reads memory itself.
class Prefetch {
 public:
  static constexpr int64_t AHEAD_BYTES = 64 << 10;

  Prefetch(const Call& c, const std::vector<Item>& items) : c_(c), items_(items) {
    const int64_t size = c.kv_dtype == FLOAT32 ? 4 : 2;
    const int64_t longest = std::max(c.dim, c.v_dim) * size;
    // neighbouring heads' rows are fetched together where they are short and lie together
    if (c.k_head == c.dim && c.v_head == c.v_dim)
      heads_ = std::clamp<int64_t>(256 / longest, 1, c.kv_heads);
    for (int v = 0; v < 2; v++) {
      base_[v] = static_cast<const char*>(v ? c.v : c.k);
      slot_[v] = (v ? c.v_slot : c.k_slot) * size;
      head_[v] = (v ? c.v_head : c.k_head) * size;
      bytes_[v] = heads_ * (v ? c.v_dim : c.dim) * size;
    }
    most_ = std::max<int64_t>(2 * BLOCK, AHEAD_BYTES / std::max(bytes_[0], bytes_[1]));
    finished_ = items.empty();
    if (!finished_) begin_block();
  }

  int64_t heads() const { return heads_; }

  inline void step(int lines) {
    for (; lines > 0; lines--) {
      if (line_ >= end_ && !next_row()) return;
      __builtin_prefetch(line_, 0, 2);  // into L2: L1 has too few misses at once
      line_ += 64;
    }
  }

  // The rows of `heads()` heads of a block of n tokens have been read; what is missing of the next
  // block is fetched at once.
  void read(int n, int64_t next_n) {
    ahead_ -= 2 * n;
    while (ahead_ < 2 * next_n && !finished_) step(64);
  }

 private:
  void begin_block() {
    const Item& item = items_[item_];
    n_ = std::min<int64_t>(BLOCK, item.end - item.begin - block_);
    slots_ = c_.table + item.row * c_.table_stride + item.begin + block_;
    token_ = 0;
  }

  // The next row to fetch, if there is one and it may be fetched already.
  bool next_row() {
    if (ahead_ >= most_ || finished_) return false;
    if (token_ == n_ && !next_rows()) return false;
    int64_t slot = slots_[token_++];
    if (c_.slot_map) slot = std::max<int64_t>(0, c_.slot_map[slot]);
    line_ = base_[values_] + slot * slot_[values_] + group_ * head_[values_];
    end_ = line_ + bytes_[values_];
    ahead_++;
    return true;
  }

  // From a block's keys to its values, then to other heads, then to the next block.
  bool next_rows() {
    token_ = 0;
    values_ = !values_;
    if (values_) return true;
    group_ += heads_;
    if (group_ < c_.kv_heads) return true;
    group_ = 0;
    block_ += BLOCK;
    if (items_[item_].begin + block_ >= items_[item_].end) {
      block_ = 0;
      finished_ = ++item_ == items_.size();
    }
    if (!finished_) begin_block();
    return !finished_;
  }

  const Call& c_;
  const std::vector<Item>& items_;
  int64_t heads_ = 1;
  const char* base_[2];
  int64_t slot_[2], head_[2], bytes_[2];  // of keys and of values
  size_t item_ = 0;
  int64_t block_ = 0, group_ = 0, token_ = 0, n_ = 0;
  bool values_ = false;
  const int32_t* slots_ = nullptr;
  const char *line_ = nullptr, *end_ = nullptr;
  int64_t ahead_ = 0, most_ = 0;  // rows
  bool finished_ = false;
};

}  // namespace
