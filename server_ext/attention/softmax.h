// The running softmax of one row.

#pragma once

#include <algorithm>
#include <cmath>

#include "vectors.h"

namespace {

// The scores of a row that are not plain products: capped, and hidden outside [low, high).
inline void cap_scores(float* scores, int vectors, float scale, float cap) {
  for (int i = 0; i < vectors; i++)
    store(scores + i * LANES, tanh_of(load(scores + i * LANES) * scale) * cap);
}

inline void hide_scores(float* scores, int vectors, int low, int high) {
  for (int i = 0; i < vectors; i++) {
    if (i * LANES >= low && (i + 1) * LANES <= high) continue;
    const vi key = lane_numbers() + i * LANES;
    const vf s = load(scores + i * LANES);
    store(scores + i * LANES, ((key >= low) & (key < high)) ? s : splat(LOWEST));
  }
}

// Folds one row's scores of a block, which are to be multiplied by `scale` (> 0), into its maximum
// and sum, and leaves the weights in place of the scores (in pairs: as bfloat16). Returns what the
// values so far are to be multiplied by. VECTORS: how many the scores are, if that is known.
template <class Kind, int VECTORS>
inline float softmax(float* scores, int any_vectors, float scale, float& maximum, float& sum) {
  const int vectors = VECTORS ? VECTORS : any_vectors;
  vf top = load(scores);
#pragma GCC unroll 16
  for (int i = 1; i < vectors; i++) {
    const vf s = load(scores + i * LANES);
    top = top > s ? top : s;
  }
  const float before = maximum;
  const float now = std::max(before, highest(top) * scale);
  vf added = vf{};
#pragma GCC unroll 16
  for (int i = 0; i < vectors; i++) {
    const vf p = exp2_of<Kind::WIDTH == 1>(load(scores + i * LANES) * scale - now);
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
