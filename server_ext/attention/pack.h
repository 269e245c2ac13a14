// A block's keys and values as the products want them.

#pragma once

#include <algorithm>

#include "multiply.h"
#include "work.h"

namespace {

#ifdef __AVX512F__
// Rows of 16 elements → columns, at to[column · stride].
inline void transpose16(__m512i* r, float* to, int64_t stride, int columns) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  __m512i out[16];
  for (int i = 0; i < 4; i++) {
    out[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    out[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    out[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    out[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
  if (columns == 16) {
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + i * stride, out[i]);
  } else {
    for (int i = 0; i < columns; i++) _mm512_storeu_si512(to + i * stride, out[i]);
  }
}
#endif

// Keys of a block → [dim / WIDTH][BLOCK]; columns past the last token repeat it.
template <class Kind, class Number>
void pack_keys(const Rows& rows, int64_t dim, float* to, Prefetch& next) {
#ifdef __AVX512F__
  for (int t = 0; t < rows.n; t += 16) {
    const char* from[16];
    for (int i = 0; i < 16; i++) from[i] = rows.at(std::min(t + i, rows.n - 1));
    for (int64_t d = 0; d < dim; d += 16 * Kind::WIDTH) {
      const int left = static_cast<int>(std::min<int64_t>(16 * Kind::WIDTH, dim - d));
      __m512i r[16];
      if constexpr (Kind::WIDTH == 2) {
        const __mmask32 mask = left == 32 ? ~0u : (1u << left) - 1;
        for (int i = 0; i < 16; i++)
          r[i] = _mm512_maskz_loadu_epi16(mask, from[i] + d * 2);
      } else {
        const __mmask16 mask = left == 16 ? 0xffff : (1u << left) - 1;
        for (int i = 0; i < 16; i++) {
          if constexpr (sizeof(Number) == 4) {
            r[i] = _mm512_maskz_loadu_epi32(mask, from[i] + d * 4);
          } else {
#ifdef __AVX512BW__
            const __m512i half =
                _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), from[i] + d * 2);
            r[i] = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(half)), 16);
#else
            alignas(64) uint32_t wide[16] = {};
            for (int j = 0; j < left; j++)
              wide[j] = static_cast<uint32_t>(
                  reinterpret_cast<const uint16_t*>(from[i])[d + j]) << 16;
            r[i] = _mm512_load_si512(wide);
#endif
          }
        }
      }
      next.step(7);
      const int columns = (left + Kind::WIDTH - 1) / Kind::WIDTH;
      transpose16(r, to + d / Kind::WIDTH * BLOCK + t, BLOCK, columns);
    }
  }
#else
  const int padded = static_cast<int>(up(rows.n, LANES));
  for (int t = 0; t < padded; t++) {
    const Number* from = reinterpret_cast<const Number*>(rows.at(std::min(t, rows.n - 1)));
    for (int64_t d = 0; d < dim; d++) {
      if constexpr (sizeof(Number) == 4)
        to[d * BLOCK + t] = from[d];
      else
        to[d * BLOCK + t] = as_float(from[d]);
    }
  }
#endif
}

// Values of a block → [token / WIDTH][v_padded], zeros past the last token and the last dimension.
template <class Kind, class Number>
void pack_values(const Rows& rows, int64_t v_dim, int64_t v_padded, float* to,
                 Prefetch& next) {
#ifdef __AVX512BF16__
  if constexpr (Kind::WIDTH == 2) {
    const __m512i low = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
        35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int t = 0; t < rows.n; t += 2) {
      const char* a = rows.at(t);
      const char* b = rows.at(std::min(t + 1, rows.n - 1));
      float* row = to + t / 2 * v_padded;
      next.step(1);
      for (int64_t d = 0; d < v_padded; d += 32) {
        const int left = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(32, v_dim - d)));
        const __mmask32 mask = left == 32 ? ~0u : (1u << left) - 1;
        const __m512i x = _mm512_maskz_loadu_epi16(mask, a + d * 2);
        const __m512i y = _mm512_maskz_loadu_epi16(t + 1 < rows.n ? mask : 0, b + d * 2);
        _mm512_storeu_si512(row + d, _mm512_permutex2var_epi16(x, low, y));
        if (d + 16 < v_padded)
          _mm512_storeu_si512(row + d + 16, _mm512_permutex2var_epi16(x, high, y));
      }
    }
    return;
  }
#endif
  for (int t = 0; t < rows.n; t++) {
    const Number* from = reinterpret_cast<const Number*>(rows.at(t));
    float* row = to + t * v_padded;
    for (int64_t d = 0; d < v_dim; d++) {
      if constexpr (sizeof(Number) == 4)
        row[d] = from[d];
      else
        row[d] = as_float(from[d]);
    }
    for (int64_t d = v_dim; d < v_padded; d++) row[d] = 0.f;
  }
}

}  // namespace
