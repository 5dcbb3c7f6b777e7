// Adapters of linear layers that read the same input, bfloat16 activations and float32 factors, for processors with AVX512-BF16.
//
//   inner_i = x A_i^T,    y_i += inner_i (s_i B_i)^T                       forward, after y = x W^T
//   pulled_i = dy_i (s_i B_i),    dx += sum over i of pulled_i A_i         backward, after dx = dy W
//   dA_i = pulled_i^T x,    dB_i = s_i dy_i^T inner_i
//
// Factors are rounded to bfloat16, sums are float32; inner and pulled are rounded once. Ranks are padded to whole vectors of
// zeros, one adapter's columns behind the other's. Threads take equal runs of rows, so sums over rows depend on their number.
#include "tiles.h"

namespace {

constexpr int64_t CHUNK = 48;  // rows that go through all steps before the next ones: they stay in the cache

struct Adapter {
  int64_t column, outputs, rank, place;  // columns of y, the rank, and where its columns begin in inner
  const float *a, *b;
  float scale;
  int64_t padded() const { return whole(rank, VECTOR); }
};

struct Adapters {
  int64_t tokens, inputs, outputs, ranks = 0;  // outputs: of all layers, those without an adapter too
  std::vector<Adapter> all;
};

// sizes: tokens, inputs, outputs, adapters, then of each: first column of y, outputs, rank.
Adapters read_adapters(const int64_t* sizes, const float* const* a, const float* const* b, const float* scales) {
  Adapters found{sizes[0], sizes[1], sizes[2]};
  for (int64_t i = 0; i < sizes[3]; ++i) {
    const int64_t* at = sizes + 4 + 3 * i;
    found.all.push_back({at[0], at[1], at[2], found.ranks, a[i], b[i], scales[i]});
    found.ranks += found.all.back().padded();
  }
  return found;
}

inline Half rounded(float x) { return Half(_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0)); }
inline Word words(float low, float high) { return Word(rounded(low)) | Word(rounded(high)) << 16; }

// A of all adapters as [inputs / 2][ranks] (what x meets) or by pairs of rows, [ranks / 2][inputs] (what pulled meets).
void turn_a(const Adapters& given, Word* to) {
#pragma omp for schedule(static)
  for (int64_t k = 0; k < given.inputs / 2; ++k)
    for (const Adapter& one : given.all)
      for (int64_t n = 0; n < one.padded(); ++n) {
        const float* from = one.a + n * given.inputs + 2 * k;
        to[k * given.ranks + one.place + n] = n < one.rank ? words(from[0], from[1]) : 0;
      }
}

void pair_a(const Adapters& given, Word* to) {
  for (const Adapter& one : given.all)
#pragma omp for schedule(static) nowait
    for (int64_t n = 0; n < one.padded(); n += 2)
      for (int64_t k = 0; k < given.inputs; ++k) {
        const float low = n < one.rank ? one.a[n * given.inputs + k] : 0, high = n + 1 < one.rank ? one.a[(n + 1) * given.inputs + k] : 0;
        to[(one.place + n) / 2 * given.inputs + k] = words(low, high);
      }
#pragma omp barrier
}

// s B of an adapter as [padded rank / 2][outputs] (what inner meets) or by pairs of rows, [outputs / 2][padded rank] (what dy meets).
void turn_b(const Adapter& one, Word* to) {
#pragma omp for schedule(static)
  for (int64_t n = 0; n < one.outputs; ++n)
    for (int64_t k = 0; k < one.padded() / 2; ++k) {
      const float* from = one.b + n * one.rank + 2 * k;
      const float low = 2 * k < one.rank ? from[0] * one.scale : 0, high = 2 * k + 1 < one.rank ? from[1] * one.scale : 0;
      to[k * one.outputs + n] = words(low, high);
    }
}

void pair_b(const Adapter& one, Word* to) {
#pragma omp for schedule(static)
  for (int64_t n = 0; n < one.outputs; n += 2)
    for (int64_t k = 0; k < one.padded(); ++k) {
      const float* from = one.b + n * one.rank + k;
      to[n / 2 * one.padded() + k] = k < one.rank ? words(from[0] * one.scale, from[one.rank] * one.scale) : 0;
    }
}

// Rows [first, first + count) of x times what is paired or turned, [depth / 2][columns], rounded: to (rows, stride).
void times(const Half* x, int64_t x_row, int64_t depth, const Word* right, int64_t columns, int64_t first, int64_t count, Half* to,
           int64_t stride) {
  const auto tiles = [&](auto rows, auto vectors, int64_t column) {
    constexpr int M = decltype(rows)::value, N = decltype(vectors)::value;
    for (int64_t at = 0; at < count; at += M) {
      const Word* a[M];
      for (int i = 0; i < M; ++i) a[i] = (const Word*)(x + (first + std::min<int64_t>(at + i, count - 1)) * x_row);
      __m512 c[M][N];
      clear(c);
      multiply<M, N>(c, a, 1, right + column, columns, depth / 2);
      for (int i = 0; i < M && at + i < count; ++i)
        for (int j = 0; j < N; ++j)
          _mm256_storeu_si256((__m256i*)(to + (first + at + i) * stride + column + j * VECTOR), to_half(c[i][j]));
    }
  };
  int64_t column = 0;
  for (; columns - column >= 64; column += 64) tiles(std::integral_constant<int, 6>{}, std::integral_constant<int, 4>{}, column);
  if (columns - column == 48) tiles(std::integral_constant<int, 8>{}, std::integral_constant<int, 3>{}, column);
  if (columns - column == 32) tiles(std::integral_constant<int, 12>{}, std::integral_constant<int, 2>{}, column);
  if (columns - column == 16) tiles(std::integral_constant<int, 16>{}, std::integral_constant<int, 1>{}, column);
}

// y += left right for rows [first, first + count): left (rows, stride) of `depth` columns, right [depth / 2][columns].
void add_times(const Half* left, int64_t stride, int64_t depth, const Word* right, int64_t columns, int64_t first, int64_t count, Half* y,
               int64_t y_row) {
  const auto tiles = [&](auto vectors, int64_t at, int64_t column) {
    constexpr int M = 6, N = decltype(vectors)::value;
    const Word* a[M];
    Half* to[M];
    __m512 c[M][N];
    for (int i = 0; i < M; ++i) {
      const int64_t row = first + std::min<int64_t>(at + i, count - 1);
      a[i] = (const Word*)(left + row * stride), to[i] = y + row * y_row + column;
      for (int j = 0; j < N; ++j) c[i][j] = to_float(to[i] + j * VECTOR);
    }
    multiply<M, N>(c, a, 1, right + column, columns, depth / 2);
    for (int i = 0; i < M && at + i < count; ++i)
      for (int j = 0; j < N; ++j) _mm256_storeu_si256((__m256i*)(to[i] + j * VECTOR), to_half(c[i][j]));
  };
  for (int64_t at = 0; at < count; at += 6) {
    int64_t column = 0;
    for (; columns - column >= 64; column += 64) tiles(std::integral_constant<int, 4>{}, at, column);
    for (; column < columns; column += 16) tiles(std::integral_constant<int, 1>{}, at, column);
  }
}

// sums [ranks][columns] += left^T x over `count` rows: left by pairs of rows, [count / 2][stride] words from column 0 on; x (count, x_row).
// Two rows of x become pairs by unpacking, which leaves the columns of 32 in another order: `unpacked` says which.
void add_outer(const Word* left, int64_t stride, int64_t ranks, const Half* x, int64_t x_row, int64_t columns, int64_t count, float* sums) {
  constexpr int M = 8;
  for (int64_t column = 0; column < columns; column += 32)
    for (int64_t rank = 0; rank < ranks; rank += M) {
      __m512 c[M][2];
      float* to = sums + rank * columns + column;
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < 2; ++j) c[i][j] = _mm512_load_ps(to + i * columns + j * VECTOR);
      for (int64_t at = 0; at < count; at += 2) {
        const __m512i top = _mm512_loadu_si512(x + at * x_row + column);
        const __m512i under = at + 1 < count ? _mm512_loadu_si512(x + (at + 1) * x_row + column) : _mm512_setzero_si512();
        const __m512bh right[2] = {(__m512bh)_mm512_unpacklo_epi16(top, under), (__m512bh)_mm512_unpackhi_epi16(top, under)};
        for (int i = 0; i < M; ++i) {
          const __m512bh one = (__m512bh)_mm512_set1_epi32(int(left[at / 2 * stride + rank + i]));
          for (int j = 0; j < 2; ++j) c[i][j] = _mm512_dpbf16_ps(c[i][j], one, right[j]);
        }
      }
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < 2; ++j) _mm512_store_ps(to + i * columns + j * VECTOR, c[i][j]);
    }
}

// Where column c of x stands in `add_outer`'s sums: lanes of 8 columns, the low four of each first.
inline int64_t unpacked(int64_t c) { return c / 32 * 32 + (c % 8 / 4) * 16 + c % 32 / 8 * 4 + c % 4; }

// This thread's part of the rows, a chunk at a time: work(first row, rows).
template <typename Work>
void over_chunks(int64_t tokens, Work work) {
  const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num(), chunks = (tokens + CHUNK - 1) / CHUNK;
  const int64_t end = std::min(tokens, chunks * (thread + 1) / threads * CHUNK);
  for (int64_t first = chunks * thread / threads * CHUNK; first < end; first += CHUNK) work(first, std::min(CHUNK, end - first));
}

thread_local Buffer<Word> shared_a, shared_b;  // of the thread that calls
thread_local Buffer<float> shared_sums;

}  // namespace

extern "C" void preftune_low_rank_forward(const Half* x, Half* y, Half* inner, const float* const* a, const float* const* b,
                                          const float* scales, const int64_t* sizes) {
  const Adapters given = read_adapters(sizes, a, b, scales);
  const int64_t outputs = given.outputs;
  Word* turned_a = shared_a.get(given.inputs / 2 * given.ranks);
  Word* turned_b = shared_b.get(given.ranks / 2 * outputs);
#pragma omp parallel
  {
    turn_a(given, turned_a);
    for (const Adapter& one : given.all) turn_b(one, turned_b + one.place / 2 * outputs);
    over_chunks(given.tokens, [&](int64_t first, int64_t count) {
      times(x, given.inputs, given.inputs, turned_a, given.ranks, first, count, inner, given.ranks);
      for (const Adapter& one : given.all)
        add_times(inner + one.place, given.ranks, one.padded(), turned_b + one.place / 2 * outputs, one.outputs, first, count, y + one.column,
                  outputs);
    });
  }
}

// dx may be null, where nothing below trains.
extern "C" void preftune_low_rank_input(const Half* grad, Half* dx, Half* pulled, const float* const* a, const float* const* b,
                                        const float* scales, const int64_t* sizes) {
  const Adapters given = read_adapters(sizes, a, b, scales);
  const int64_t outputs = given.outputs;
  Word* paired_a = shared_a.get(given.ranks / 2 * given.inputs);
  Word* paired_b = shared_b.get(given.ranks / 2 * outputs);
#pragma omp parallel
  {
    pair_a(given, paired_a);
    for (const Adapter& one : given.all) pair_b(one, paired_b + one.place / 2 * outputs);
    over_chunks(given.tokens, [&](int64_t first, int64_t count) {
      for (const Adapter& one : given.all)
        times(grad + one.column, outputs, one.outputs, paired_b + one.place / 2 * outputs, one.padded(), first, count, pulled + one.place,
              given.ranks);
      if (dx) add_times(pulled, given.ranks, given.ranks, paired_a, given.inputs, first, count, dx, given.inputs);
    });
  }
}

// of_a, of_b: the gradients of the factors, float32, (rank, inputs) and (outputs, rank).
extern "C" void preftune_low_rank_factors(const Half* grad, const Half* x, const Half* inner, const Half* pulled, float* const* of_a,
                                          float* const* of_b, const float* scales, const int64_t* sizes) {
  const Adapters given = read_adapters(sizes, of_a, of_b, scales);
  const int64_t outputs = given.outputs, size = given.ranks * (given.inputs + outputs), most = omp_get_max_threads();
  float* sums = shared_sums.get(size * most);
#pragma omp parallel
  {
    thread_local Buffer<Word> paired_rows;
    const int64_t ranks = given.ranks;
    Word* left = paired_rows.get(CHUNK / 2 * ranks);
    float* own = sums + size * omp_get_thread_num();
    std::memset(own, 0, sizeof(float) * size);
    const auto pair = [&](const Half* from, int64_t first, int64_t count) {
      for (int64_t i = 0; i < count; i += 2)
        interleave(from + (first + i) * ranks, i + 1 < count ? from + (first + i + 1) * ranks : nullptr, ranks, left + i / 2 * ranks);
    };
    over_chunks(given.tokens, [&](int64_t first, int64_t count) {
      pair(pulled, first, count);
      add_outer(left, ranks, ranks, x + first * given.inputs, given.inputs, given.inputs, count, own);
      pair(inner, first, count);
      for (const Adapter& one : given.all)
        add_outer(left + one.place, ranks, one.padded(), grad + first * outputs + one.column, outputs, one.outputs, count,
                  own + ranks * given.inputs + one.place * outputs);
    });
#pragma omp barrier
    const int64_t threads = omp_get_num_threads();
    const auto total = [&](int64_t at) {
      float sum = 0;
      for (int64_t t = 0; t < threads; ++t) sum += sums[t * size + at];
      return sum;
    };
    for (size_t i = 0; i < given.all.size(); ++i) {
      const Adapter& one = given.all[i];
#pragma omp for schedule(static) nowait
      for (int64_t n = 0; n < one.rank; ++n)
        for (int64_t k = 0; k < given.inputs; ++k)
          of_a[i][n * given.inputs + k] = total((one.place + n) * given.inputs + unpacked(k));
#pragma omp for schedule(static) nowait
      for (int64_t k = 0; k < one.outputs; ++k)
        for (int64_t n = 0; n < one.rank; ++n)
          of_b[i][k * one.rank + n] = one.scale * total(ranks * given.inputs + one.place * outputs + n * one.outputs + unpacked(k));
    }
  }
}
