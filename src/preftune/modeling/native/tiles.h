// What our kernels share: vectors of bfloat16 and their products, for processors with AVX512-BF16.
//
// Every product is one micro-kernel over pairs of bfloat16 (vdpbf16ps): c[i][:] += sum over s of a[i][s] * b[s][:], where a word
// holds two neighbours of the summed axis. So an operand is laid out either as it stands (its rows run along the summed axis), by
// pairs of rows (`interleave`), or turned by words.
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <type_traits>
#include <vector>

namespace {

using Half = uint16_t;  // bits of a bfloat16
using Word = uint32_t;  // two of them

constexpr int64_t VECTOR = 16;  // floats of a vector

struct Rows {  // (tokens, heads, width), the last axis dense
  Half* data;
  int64_t token, head;
  Half* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

inline int64_t whole(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

template <typename T>
struct Buffer {  // grows, 64-byte aligned, its contents undefined
  T* get(int64_t count) {
    if (count > size) {
      data.reset(static_cast<T*>(std::aligned_alloc(64, whole(count * int64_t(sizeof(T)), 64))));
      size = count;
    }
    return data.get();
  }
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data;
  int64_t size = 0;
};

// Within 2 units in the last place for x in [-87, 88]. What is no number stays none, here and in the comparisons before it: a
// model that broke has to be seen.
inline __m512 exp_of(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504089f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(y, n);
}

inline __m512 to_float(const Half* x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)x)), 16));
}

inline __m256i to_half(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline __mmask16 lanes(int64_t seen) { return seen >= VECTOR ? 0xffff : seen <= 0 ? 0 : __mmask16((1u << seen) - 1); }

inline float dot(const Half* a, const Half* b, int64_t width) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t d = 0; d < width; d += VECTOR) {
    sum = _mm512_fmadd_ps(to_float(a + d), to_float(b + d), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

template <int M, int N>
inline void multiply(__m512 (&c)[M][N], const Word* const (&a)[M], int64_t step, const Word* b, int64_t b_row, int64_t steps) {
  for (int64_t s = 0; s < steps; ++s) {
    __m512bh right[N];
    for (int j = 0; j < N; ++j) right[j] = (__m512bh)_mm512_load_si512(b + s * b_row + VECTOR * j);
    for (int i = 0; i < M; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(int(a[i][s * step]));
      for (int j = 0; j < N; ++j) c[i][j] = _mm512_dpbf16_ps(c[i][j], left, right[j]);
    }
  }
}

template <int M, int N>
inline void clear(__m512 (&c)[M][N]) {
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) c[i][j] = _mm512_setzero_ps();
}

// Two rows as one of words: (a[d], b[d]) for every d. A row that is not there counts as zeros.
inline void interleave(const Half* a, const Half* b, int64_t width, Word* to) {
  for (int64_t d = 0; d < width; d += VECTOR) {
    const __m512i low = a ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(a + d))) : _mm512_setzero_si512();
    const __m512i high = b ? _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(b + d))) : _mm512_setzero_si512();
    _mm512_store_si512(to + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

}  // namespace
