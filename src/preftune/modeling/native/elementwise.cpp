// The elementwise work of a transformer block (modeling/kernels.py says what), bfloat16, for processors with AVX512-BF16.
//
// Sums and products are float32, each result is rounded once. Rows are dense and of whole vectors; threads share rows, so no
// sum depends on their number.
#include "tiles.h"

namespace {

inline __m512 set(float x) { return _mm512_set1_ps(x); }
inline __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
inline __m512 mul(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
inline __m512 sub(__m512 a, __m512 b) { return _mm512_sub_ps(a, b); }
inline void put(Half* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, to_half(x)); }

// 1 / (1 + exp(-x)); the limits stand first, so that what is no number stays none.
inline __m512 sigmoid(__m512 x) {
  const __m512 low = _mm512_min_ps(set(87.0f), _mm512_max_ps(set(-87.0f), sub(_mm512_setzero_ps(), x)));
  const __mmask16 counts = _mm512_cmp_ps_mask(x, set(-87.0f), _CMP_NLT_UQ);
  return _mm512_maskz_div_ps(counts, set(1.0f), add(set(1.0f), exp_of(low)));
}

// normed = x s w with s = 1 / sqrt(mean(x^2) + eps) of a row, which is returned.
inline float norm_row(const Half* x, const Half* weight, int64_t width, float eps, Half* normed) {
  const float s = 1.0f / std::sqrt(dot(x, x, width) / float(width) + eps);
  for (int64_t d = 0; d < width; d += VECTOR) put(normed + d, mul(mul(to_float(x + d), set(s)), to_float(weight + d)));
  return s;
}

// (a, b) -> (a c - b s, b c + a s) of the two halves of a head.
inline void turn_head(const Half* from, const Half* cos, const Half* sin, int64_t half, float sign, Half* to) {
  for (int64_t d = 0; d < half; d += VECTOR) {
    const __m512 a = to_float(from + d), b = to_float(from + half + d);
    // turning back takes the sines of the other half, with the other sign
    const __m512 first = to_float(sin + (sign > 0 ? d : half + d)), second = to_float(sin + (sign > 0 ? half + d : d));
    put(to + d, sub(mul(a, to_float(cos + d)), mul(mul(b, first), set(sign))));
    put(to + half + d, add(mul(b, to_float(cos + half + d)), mul(mul(a, second), set(sign))));
  }
}

}  // namespace

// sizes: rows, width.
extern "C" void preftune_rms(const Half* x, const Half* weight, Half* normed, float* scale, const int64_t* sizes, float eps) {
  const int64_t rows = sizes[0], width = sizes[1];
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < rows; ++t) scale[t] = norm_row(x + t * width, weight, width, eps, normed + t * width);
}

extern "C" void preftune_add_rms(const Half* x, const Half* branch, const Half* weight, Half* total, Half* normed, float* scale,
                                 const int64_t* sizes, float eps) {
  const int64_t rows = sizes[0], width = sizes[1];
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t at = t * width;
    for (int64_t d = at; d < at + width; d += VECTOR) put(total + d, add(to_float(x + d), to_float(branch + d)));
    scale[t] = norm_row(total + at, weight, width, eps, normed + at);
  }
}

// dx = s (g - h mean(g h)) + residual with h = x s, g = grad w; normed = h w.
extern "C" void preftune_rms_backward(const Half* grad, const Half* x, const float* scale, const Half* weight, const Half* residual,
                                      Half* dx, Half* normed, const int64_t* sizes) {
  const int64_t rows = sizes[0], width = sizes[1];
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t at = t * width;
    const __m512 s = set(scale[t]);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < width; d += VECTOR) {
      const __m512 g = mul(to_float(grad + at + d), to_float(weight + d));
      sum = _mm512_fmadd_ps(g, mul(to_float(x + at + d), s), sum);
    }
    const __m512 mean = set(_mm512_reduce_add_ps(sum) / float(width));
    for (int64_t d = 0; d < width; d += VECTOR) {
      const __m512 w = to_float(weight + d), h = mul(to_float(x + at + d), s), g = mul(to_float(grad + at + d), w);
      put(dx + at + d, add(mul(sub(g, mul(h, mean)), s), to_float(residual + at + d)));
      put(normed + at + d, mul(h, w));
    }
  }
}

// In place: the first `turned` of a row's heads, each of `width`. sizes: rows, elements of a row, turned, width.
extern "C" void preftune_rotate(Half* y, const Half* cos, const Half* sin, const int64_t* sizes) {
  const int64_t rows = sizes[0], row = sizes[1], turned = sizes[2], width = sizes[3];
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t h = 0; h < turned; ++h) {
      Half* head = y + t * row + h * width;
      turn_head(head, cos + t * width, sin + t * width, width / 2, 1.0f, head);
    }
}

// sizes: rows, query heads, key heads, width; strides: token and head of dq, dk, dv. to (rows, query + 2 key heads, width).
extern "C" void preftune_rotate_backward(const Half* dq, const Half* dk, const Half* dv, const Half* cos, const Half* sin, Half* to,
                                         const int64_t* sizes, const int64_t* strides) {
  const int64_t rows = sizes[0], heads = sizes[1], kv_heads = sizes[2], width = sizes[3];
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < rows; ++t) {
    Half* at = to + t * (heads + 2 * kv_heads) * width;
    const Half *c = cos + t * width, *s = sin + t * width;
    for (int64_t h = 0; h < heads; ++h, at += width) turn_head(dq + t * strides[0] + h * strides[1], c, s, width / 2, -1.0f, at);
    for (int64_t h = 0; h < kv_heads; ++h, at += width) turn_head(dk + t * strides[2] + h * strides[3], c, s, width / 2, -1.0f, at);
    for (int64_t h = 0; h < kv_heads; ++h, at += width) std::memcpy(at, dv + t * strides[4] + h * strides[5], sizeof(Half) * width);
  }
}

// both (rows, 2 width), gate before up. sizes: rows, width.
extern "C" void preftune_swiglu(const Half* both, Half* act, const int64_t* sizes) {
  const int64_t rows = sizes[0], width = sizes[1];
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < rows; ++t) {
    const Half *gate = both + 2 * t * width, *up = gate + width;
    for (int64_t d = 0; d < width; d += VECTOR) {
      const __m512 g = to_float(gate + d);
      put(act + t * width + d, mul(mul(g, sigmoid(g)), to_float(up + d)));
    }
  }
}

extern "C" void preftune_swiglu_backward(const Half* both, const Half* grad, Half* of_both, Half* act, const int64_t* sizes) {
  const int64_t rows = sizes[0], width = sizes[1];
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < rows; ++t) {
    const Half *gate = both + 2 * t * width, *up = gate + width, *given = grad + t * width;
    Half *of_gate = of_both + 2 * t * width, *of_up = of_gate + width;
    for (int64_t d = 0; d < width; d += VECTOR) {
      const __m512 g = to_float(gate + d), u = to_float(up + d), high = to_float(given + d);
      const __m512 open = sigmoid(g), silu = mul(g, open);
      put(of_gate + d, mul(mul(high, u), add(open, mul(silu, sub(set(1.0f), open)))));
      put(of_up + d, mul(high, silu));
      put(act + t * width + d, mul(silu, u));
    }
  }
}

// probabilities of logits (rows, width) in place, and log p of the chosen id of each row; the width is any.
extern "C" void preftune_token_softmax(Half* logits, const int64_t* chosen, float* logps, const int64_t* sizes) {
  const int64_t rows = sizes[0], width = sizes[1], vectors = whole(width, VECTOR);
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < rows; ++t) {
    thread_local Buffer<float> buffer;
    float* raised = buffer.get(vectors);
    Half* row = logits + t * width;
    const auto at = [&](int64_t d) {  // what stands behind the last id counts for nothing
      const __mmask16 seen = lanes(width - d);
      const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(seen, row + d));
      return _mm512_mask_mov_ps(set(-3e38f), seen, _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)));
    };
    __m512 most[4], total[4] = {};
    for (__m512& one : most) one = set(-3e38f);
    for (int64_t d = 0; d < width; d += VECTOR) most[d / VECTOR % 4] = _mm512_max_ps(most[d / VECTOR % 4], at(d));
    const float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])));
    const Word bits = Word(row[chosen[t]]) << 16;
    float score;
    std::memcpy(&score, &bits, sizeof score);
    for (int64_t d = 0; d < width; d += VECTOR) {
      const __m512 x = exp_of(_mm512_max_ps(set(-87.0f), sub(at(d), set(top))));
      total[d / VECTOR % 4] = _mm512_mask_add_ps(total[d / VECTOR % 4], lanes(width - d), total[d / VECTOR % 4], x);
      _mm512_store_ps(raised + d, x);
    }
    const float sum = _mm512_reduce_add_ps(add(add(total[0], total[1]), add(total[2], total[3])));
    const __m512 inverse = set(1.0f / sum);
    for (int64_t d = 0; d < width; d += VECTOR)
      _mm256_mask_storeu_epi16(row + d, lanes(width - d), to_half(mul(_mm512_load_ps(raised + d), inverse)));
    logps[t] = score - top - std::log(sum);
  }
}
