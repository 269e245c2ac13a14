// What is to be done: the arguments of a call, the plan's runs, and the items of work.

#pragma once

#include <cstdint>

namespace {

enum Dtype : int32_t { FLOAT32 = 0, BFLOAT16 = 1 };

struct Call {  // as kernel.py's `Call`: strides in elements, the innermost ones are 1
  const void* q;
  void* out;
  const void* k;
  const void* v;
  const int32_t* table;      // [requests, table_stride]: slot of each token
  const int64_t* slot_map;   // slot → slot of this layer's pool; or null
  const int32_t* runs;       // [n_runs, 5]: row, begin, end (-1: open), first, last
  const int32_t* first_query;  // [sequences + 1]: in the plan's order
  const int64_t* query_token;  // [queries]: its row in q and out
  const int64_t* query_position;  // [queries]
  int64_t n_runs, n_queries;
  int64_t q_token, q_head, out_token, out_head, k_slot, k_head, v_slot, v_head, table_stride;
  int64_t q_heads, kv_heads, dim, v_dim;
  int64_t window;  // keys before position - window are hidden; negative: none are
  int64_t threads;
  int32_t q_dtype, kv_dtype;
  float scale, cap;  // cap 0: no soft cap
};

struct Run {
  int32_t row, begin, end, first, last;
};

constexpr int BLOCK = 64;           // tokens packed at a time


struct Item {  // keys [begin, end) of a table row for the queries [first, last)
  int32_t row;
  int64_t begin, end, first, last;
  int64_t lowest, highest;  // position of a query
};

inline int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace
