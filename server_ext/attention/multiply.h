// Products of a few rows with a packed block, which fetch coming blocks meanwhile.

#pragma once

#include <utility>

#include "prefetch.h"
#include "vectors.h"

namespace {

// `Floats`: keys and values become float32. `Pairs`: bfloat16 stays and two products are summed at
// once (vdpbf16ps), in float32. Both pack a block's keys as [dim][BLOCK] and its values as
// [token][v_dim], in elements of 32 bits: a float, or a pair of neighbours in dim or in token.

struct Floats {
  static constexpr int WIDTH = 1;  // numbers in an element
  static inline vf one(const float* p) { return splat(*p); }
  static inline vf multiply(vf sum, vf many, vf one) { return sum + many * one; }
};

#ifdef __AVX512BF16__
struct Pairs {
  static constexpr int WIDTH = 2;
  static inline vf one(const float* p) {
    int32_t pair;
    std::memcpy(&pair, p, 4);
    return (vf)_mm512_set1_epi32(pair);
  }
  static inline vf multiply(vf sum, vf many, vf one) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)many, (__m512bh)one);
  }
};
#endif

// sum[r][c] = rescale[r] · sum[r][c] + Σ_i many[i][c] · one[r][i] for ROWS rows and COUNT vectors;
// without `rescale` the sum begins at 0. The packs of indices unroll every loop over registers
// before the compiler decides what is in one.
template <class Kind, int ROWS, int COUNT, int... R, int... C, int... I>
inline void tile(std::integer_sequence<int, R...>, std::integer_sequence<int, C...>,
                 std::integer_sequence<int, I...>, const float* many, int64_t many_stride,
                 const float* one, int64_t one_stride, int64_t n, float* sum, int64_t sum_stride,
                 const float* rescale, Prefetch& prefetch) {
  vf acc[ROWS * COUNT];
  if (rescale)
    ((acc[I] = load(sum + I / COUNT * sum_stride + I % COUNT * LANES) * rescale[I / COUNT]), ...);
  else
    ((acc[I] = vf{}), ...);
  const float* ones[ROWS] = {one + R * one_stride...};
  for (int64_t i = 0; i < n; i++, many += many_stride) {
    prefetch.step(3);
    const vf column[COUNT] = {load(many + C * LANES)...};
    vf row[ROWS];
    ((row[R] = Kind::one(ones[R] + i)), ...);
    ((acc[I] = Kind::multiply(acc[I], column[I % COUNT], row[I / COUNT])), ...);
  }
  (store(sum + I / COUNT * sum_stride + I % COUNT * LANES, acc[I]), ...);
}

// The same for any number of columns (a multiple of LANES).
template <class Kind, int ROWS>
void tiles(const float* many, int64_t many_stride, const float* one, int64_t one_stride, int64_t n,
           float* sum, int64_t sum_stride, const float* rescale, int64_t columns,
           Prefetch& prefetch) {
  int64_t c = 0;
  const auto run = [&](auto count) {
    constexpr int COUNT = count.value;
    tile<Kind, ROWS, COUNT>(std::make_integer_sequence<int, ROWS>(),
                            std::make_integer_sequence<int, COUNT>(),
                            std::make_integer_sequence<int, ROWS * COUNT>(), many + c, many_stride,
                            one, one_stride, n, sum + c, sum_stride, rescale, prefetch);
    c += count.value * LANES;
  };
  while (columns - c >= COLUMNS * LANES) run(std::integral_constant<int, COLUMNS>());
  switch ((columns - c) / LANES) {
    case 3: run(std::integral_constant<int, 3>()); break;
    case 2: run(std::integral_constant<int, 2>()); break;
    case 1: run(std::integral_constant<int, 1>()); break;
  }
}

}  // namespace
