// The running softmax of one row.

#pragma once

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace {

// Folds one row's scores of a block into its maximum and sum, and leaves the weights in place of
// the scores (in pairs: as bfloat16). Keys outside [low, high) are hidden. Returns what the values
// so far are to be multiplied by.
template <class Kind>
inline float softmax(float* scores, int vectors, int low, int high, float scale, float cap,
                     float& maximum, float& sum) {
  const vi lanes = lane_numbers();
  vf top = splat(LOWEST);
  for (int i = 0; i < vectors; i++) {
    vf s = load(scores + i * LANES) * scale;
    if (cap != 0.f) s = tanh_of(s) * cap;
    if (i * LANES < low || (i + 1) * LANES > high) {
      const vi key = lanes + i * LANES;
      s = ((key >= low) & (key < high)) ? s : splat(LOWEST);
    }
    top = top > s ? top : s;
    store(scores + i * LANES, s);
  }
  const float before = maximum;
  const float now = std::max(before, highest(top));
  vf added = vf{};
  for (int i = 0; i < vectors; i++) {
    const vf p = exp2_of(load(scores + i * LANES) - now);
    added += p;
#ifdef __AVX512BF16__
    if constexpr (Kind::WIDTH == 2) {
      const __m256bh half = _mm512_cvtneps_pbh((__m512)p);
      std::memcpy(scores + i * LANES / 2, &half, 32);
      continue;
    }
#endif
    store(scores + i * LANES, p);
  }
  if (now == before) {
    sum += total(added);
    return 1.f;
  }
  const float rescale = std::exp2(before - now);
  maximum = now;
  sum = sum * rescale + total(added);
  return rescale;
}

}  // namespace
