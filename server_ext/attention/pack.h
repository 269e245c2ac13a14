// A block's keys and values as the products want them.

#pragma once

#include <algorithm>

#include "multiply.h"
#include "work.h"

namespace {

struct Rows {  // the rows of one KV head in a block
  const char* base;
  int64_t stride;  // bytes
  const int64_t* slots;
  int n;
  inline const char* at(int i) const { return base + slots[i] * stride; }
};

#ifdef AVX512
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

#ifdef AVX512
// Up to 16 elements of a row: `left` numbers, or all of them.
template <class Kind, class Number, bool ALL>
inline __m512i elements(const void* from, int left) {
  if constexpr (Kind::WIDTH * sizeof(Number) == 4) {
    if constexpr (ALL) return _mm512_loadu_si512(from);
    if constexpr (sizeof(Number) == 4)
      return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << left) - 1), from);
    return _mm512_maskz_loadu_epi16((1u << left) - 1, from);
  } else {
    const __mmask16 mask = ALL ? 0xffff : (1u << left) - 1;
    const __m256i half = _mm512_castsi512_si256(_mm512_maskz_loadu_epi16(mask, from));
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
  }
}

template <class Kind, class Number, bool ALL>
inline void pack_16_keys(const char* const* from, int left, float* to) {
  __m512i rows[16];
  for (int i = 0; i < 16; i++) rows[i] = elements<Kind, Number, ALL>(from[i], left);
  transpose16(rows, to, BLOCK, ALL ? 16 : (left + Kind::WIDTH - 1) / Kind::WIDTH);
}
#endif

// Keys of a block → [dim / WIDTH][BLOCK]; columns past the last token repeat it.
template <class Kind, class Number>
void pack_keys(const Rows& rows, int dim, float* to) {
#ifdef AVX512
  constexpr int STEP = 16 * Kind::WIDTH;
  for (int t = 0; t < rows.n; t += 16) {
    const char* from[16];
    for (int i = 0; i < 16; i++) from[i] = rows.at(std::min(t + i, rows.n - 1));
    for (int d = 0; d < dim; d += STEP) {
      float* column = to + d / Kind::WIDTH * BLOCK + t;
      if (dim - d >= STEP)
        pack_16_keys<Kind, Number, true>(from, STEP, column);
      else
        pack_16_keys<Kind, Number, false>(from, dim - d, column);
      for (int i = 0; i < 16; i++) from[i] += STEP * sizeof(Number);
    }
  }
#else
  const int padded = static_cast<int>(up(rows.n, LANES));
  for (int t = 0; t < padded; t++) {
    const Number* from = reinterpret_cast<const Number*>(rows.at(std::min(t, rows.n - 1)));
    for (int d = 0; d < dim; d++) to[d * BLOCK + t] = as_float(from[d]);
  }
#endif
}

// Values of a block → [token / WIDTH][v_padded], zeros past the last token and the last dimension.
template <class Kind, class Number>
void pack_values(const Rows& rows, int v_dim, int v_padded, float* to) {
#ifdef __AVX512BF16__
  if constexpr (Kind::WIDTH == 2) {
    const __m512i low = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
        35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const int whole = v_dim / 32 * 32;
    for (int t = 0; t < rows.n; t += 2) {
      const bool both = t + 1 < rows.n;
      const uint16_t* a = reinterpret_cast<const uint16_t*>(rows.at(t));
      const uint16_t* b = reinterpret_cast<const uint16_t*>(rows.at(both ? t + 1 : t));
      float* row = to + t / 2 * v_padded;
      const auto interleave = [&](int d, __m512i x, __m512i y) {
        if (!both) y = _mm512_setzero_si512();
        _mm512_storeu_si512(row + d, _mm512_permutex2var_epi16(x, low, y));
        if (d + 16 < v_padded)
          _mm512_storeu_si512(row + d + 16, _mm512_permutex2var_epi16(x, high, y));
      };
      for (int d = 0; d < whole; d += 32)
        interleave(d, _mm512_loadu_si512(a + d), _mm512_loadu_si512(b + d));
      if (whole < v_dim)
        interleave(whole, elements<Kind, Number, false>(a + whole, v_dim - whole),
                   elements<Kind, Number, false>(b + whole, v_dim - whole));
    }
    return;
  }
#endif
  for (int t = 0; t < rows.n; t++) {
    const Number* from = reinterpret_cast<const Number*>(rows.at(t));
    float* row = to + t * v_padded;
    for (int d = 0; d < v_dim; d++) row[d] = as_float(from[d]);
    for (int d = v_dim; d < v_padded; d++) row[d] = 0.f;
  }
}

}  // namespace
