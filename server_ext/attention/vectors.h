// Vectors of floats, in the compiler's own terms, so that every processor has them.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define AVX512
#include <immintrin.h>
#endif

namespace {

constexpr float LOWEST = -3e38f;
constexpr float LOG2E = 1.44269504088896340736f;

#if defined(AVX512)
constexpr int LANES = 16, MAX_ROWS = 7;
#elif defined(__AVX__)
constexpr int LANES = 8, MAX_ROWS = 3;
#else
constexpr int LANES = 4, MAX_ROWS = 6;
#endif
constexpr int COLUMNS = 4;  // vectors a row's tile is wide

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef float unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline vf splat(float x) { return x - vf{}; }
inline vf load(const float* p) { return *reinterpret_cast<const unaligned*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<unaligned*>(p) = x; }

inline vi lane_numbers() {
  vi lanes;
  for (int i = 0; i < LANES; i++) lanes[i] = i;
  return lanes;
}

inline float highest(vf x) {
#ifdef AVX512
  return _mm512_reduce_max_ps((__m512)x);
#else
  float m = x[0];
  for (int i = 1; i < LANES; i++) m = std::max(m, x[i]);
  return m;
#endif
}

inline float total(vf x) {
#ifdef AVX512
  return _mm512_reduce_add_ps((__m512)x);
#else
  float s = x[0];
  for (int i = 1; i < LANES; i++) s += x[i];
  return s;
#endif
}

// 2^x to 2 units in the last place, or if not EXACT to 4e-6 of it, for x <= 126; 0 or almost below
// 2^-126.
template <bool EXACT = true>
inline vf exp2_of(vf x) {
#ifdef AVX512
  const __m512 y = _mm512_max_ps((__m512)x, _mm512_set1_ps(-160.f));
  const __m512 n = _mm512_roundscale_ps(y, 0);
  const vf f = (vf)_mm512_sub_ps(y, n);
#else
  const vf magic = splat(12582912.f);  // 1.5 · 2^23: adding it rounds to an integer
  const vf shifted = x + magic;
  const vf f = x - (shifted - magic);
#endif
  vf p;
  if constexpr (EXACT) {
    p = splat(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
  } else {
    p = splat(9.60040e-3f);
    p = p * f + 5.591689e-2f;
    p = p * f + 2.4023718e-1f;
    p = p * f + 6.9312199e-1f;
  }
  p = p * f + 1.f;
#ifdef AVX512
  return (vf)_mm512_scalef_ps((__m512)p, n);
#else
  const vf y = (vf)((vi)p + ((vi)shifted << 23));
  return x < -126.f ? splat(0.f) : y;
#endif
}

inline vf tanh_of(vf x) {
  const vf e = exp2_of(x * (2.f * LOG2E) > 120.f ? splat(120.f) : x * (2.f * LOG2E));
  return 1.f - 2.f / (e + 1.f);
}

inline float as_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

inline float as_float(float x) { return x; }

inline uint16_t as_bfloat16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace
