// Attention of packs in which every prompt stands once, bfloat16, forward and backward, for processors with AVX512-BF16.
//
// A group is a tree of causal sequences: the prompt with its first completion (the chain), and every other completion, which
// sees the prompt and itself. Rows of a head meet keys in blocks of 64; what no row of a tile sees is never formed. Scores and
// probabilities live in the caches only: forward keeps the log-sum-exp of each row, and backward forms the probabilities
// again from it (Dao 2023, arXiv:2307.08691), with delta = sum(dO * O) for the softmax's gradient.
//
// Strides count elements. Threads share heads of groups, the largest first; no result depends on the number of threads.
#include "groups.h"

namespace {

constexpr int FORWARD_ROWS = 6, BACKWARD_ROWS = 4;  // of a tile
constexpr int64_t BLOCK_ROWS = 96;                   // of all heads of a task, before what they give dK and dV is added up
constexpr int64_t SPLIT_FROM = 512, SPLIT_TO = 8192;  // tokens of a group: between them each query head is a task of its own

struct Given {  // of a whole pack; lse (heads, tokens)
  Shape shape;
  int64_t tokens;
  Rows q, k, v, out;
  float* lse;
  Rows grad, dq, dk, dv;  // of backward
};

struct Scratch {
  Buffer<Word> keys_turned, values_turned, keys_paired, values_paired, q_paired, grad_paired, p_paired, ds_paired;
  Buffer<Half> p, ds;
  Buffer<float> scores;
};

// Rows of halves (M of them, `stride` words apart) times what is paired, over the runs that they see; each column tile to `store`.
template <int M, typename Store>
inline void over_keys(const Word* left, int64_t stride, const Run* runs, int number, const Word* paired, int64_t width, Store store) {
  auto columns = [&](auto tile, int64_t d) {
    constexpr int N = decltype(tile)::value;
    __m512 c[M][N];
    clear(c);
    int64_t at = 0;
    for (int r = 0; r < number; ++r) {
      const Word* a[M];
      for (int i = 0; i < M; ++i) a[i] = left + i * stride + at;
      const int64_t seen = std::min(runs[r].blocks * KEYS, runs[r].seen(M - 1));
      multiply<M, N>(c, a, 1, paired + runs[r].column / 2 * width + d, width, (seen + 1) / 2);
      at += runs[r].blocks * KEYS / 2;
    }
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) store(i, d + j * VECTOR, c[i][j]);
  };
  int64_t d = 0;
  for (; d + 64 <= width; d += 64) columns(std::integral_constant<int, 4>{}, d);
  for (; d < width; d += VECTOR) columns(std::integral_constant<int, 1>{}, d);
}

void forward_task(const Given& given, const Group& group, int64_t first_head, int64_t num_heads) {
  const Shape& shape = given.shape;
  const Rows &q = given.q, &out = given.out;
  thread_local Scratch scratch;
  constexpr int M = FORWARD_ROWS;
  const int64_t kv_head = first_head / (shape.heads / shape.kv_heads), width = shape.width;
  Word* turned = scratch.keys_turned.get(group.columns * width / 2);
  Word* paired = scratch.values_paired.get(group.columns / 2 * shape.out_width);
  lay_out(group, given.k, kv_head, width, turned, nullptr);
  lay_out(group, given.v, kv_head, shape.out_width, nullptr, paired);
  float* scores = scratch.scores.get(M * (group.columns + KEYS));
  Half* p = scratch.p.get(M * (group.columns + KEYS));
  for (int64_t head = first_head; head < first_head + num_heads; ++head)
    for (const Sequence& one : group.sequences)
      for (int64_t at = 0; at < one.rows; at += M) {
        const int64_t count = std::min<int64_t>(M, one.rows - at);
        Run runs[2];
        const int number = runs_of(one, at, count, runs);
        int64_t columns = 0;
        for (int r = 0; r < number; ++r) columns += runs[r].blocks * KEYS;
        const Word* rows[M];
        for (int i = 0; i < M; ++i) rows[i] = (const Word*)q.at(one.row + at + std::min<int64_t>(i, count - 1), head);
        __m512 most[M], total[M];
        for (int i = 0; i < M; ++i) most[i] = _mm512_set1_ps(-3e38f), total[i] = _mm512_setzero_ps();
        int64_t column = 0;
        for (int r = 0; r < number; ++r)
          for (int64_t b = 0; b < runs[r].blocks; ++b, column += KEYS) {
            __m512 c[M][4];
            clear(c);
            multiply<M, 4>(c, rows, 1, turned + (runs[r].column + b * KEYS) * width / 2, KEYS, width / 2);
            for (int i = 0; i < M; ++i)
              for (int j = 0; j < 4; ++j) {
                const __mmask16 seen = lanes(runs[r].seen(i) - b * KEYS - j * VECTOR);
                c[i][j] = _mm512_mask_mov_ps(_mm512_set1_ps(-3e38f), seen, c[i][j]);
                most[i] = _mm512_max_ps(most[i], c[i][j]);
                _mm512_store_ps(scores + i * columns + column + j * VECTOR, c[i][j]);
              }
          }
        float top[M];
        for (int i = 0; i < M; ++i) {
          top[i] = _mm512_reduce_max_ps(most[i]);
          for (int64_t x = 0; x < columns; x += VECTOR) {
            const __m512 apart = _mm512_sub_ps(_mm512_load_ps(scores + i * columns + x), _mm512_set1_ps(top[i]));
            const __m512 low = _mm512_mul_ps(apart, _mm512_set1_ps(shape.scale));
            const __mmask16 counts = _mm512_cmp_ps_mask(low, _mm512_set1_ps(-87.0f), _CMP_NLE_UQ);
            const __m512 raised = _mm512_maskz_mov_ps(counts, exp_of(_mm512_maskz_mov_ps(counts, low)));
            total[i] = _mm512_add_ps(total[i], raised);
            _mm256_storeu_si256((__m256i*)(p + i * columns + x), to_half(raised));
          }
        }
        float inverse[M];
        for (int i = 0; i < count; ++i) {
          const float sum = _mm512_reduce_add_ps(total[i]);
          inverse[i] = 1.0f / sum;
          given.lse[head * given.tokens + one.row + at + i] = top[i] * shape.scale + std::log(sum);
        }
        over_keys<M>((const Word*)p, columns / 2, runs, number, paired, shape.out_width, [&](int i, int64_t d, __m512 c) {
          if (i < count) {
            Half* to = out.at(one.row + at + i, head) + d;
            _mm256_storeu_si256((__m256i*)to, to_half(_mm512_mul_ps(c, _mm512_set1_ps(inverse[i]))));
          }
        });
      }
}

// sum over rows of left^T right, added to `to`, for the blocks of keys of the runs: left (row pairs, columns), right (row pairs, width).
inline void add_over_rows(const Word* left, int64_t columns, const Run* runs, int number, const Word* right, int64_t pairs, int64_t width,
                          float* to) {
  auto part = [&](auto tile, int64_t d) {
    constexpr int N = decltype(tile)::value, M = 4;
    int64_t at = 0;
    for (int r = 0; r < number; ++r)
      for (int64_t key = 0; key < runs[r].blocks * KEYS; key += M, at += M) {
        const Word* a[M] = {left + at, left + at + 1, left + at + 2, left + at + 3};
        __m512 c[M][N];
        float* place = to + (runs[r].column + key) * width + d;
        for (int i = 0; i < M; ++i)
          for (int j = 0; j < N; ++j) c[i][j] = _mm512_load_ps(place + i * width + j * VECTOR);
        multiply<M, N>(c, a, columns, right + d, width, pairs);
        for (int i = 0; i < M; ++i)
          for (int j = 0; j < N; ++j) _mm512_store_ps(place + i * width + j * VECTOR, c[i][j]);
      }
  };
  int64_t d = 0;
  for (; d + 64 <= width; d += 64) part(std::integral_constant<int, 4>{}, d);
  for (; d < width; d += VECTOR) part(std::integral_constant<int, 1>{}, d);
}

// Rows [at, at + count) of a sequence, for all heads of a key head: the heads lie one below the other, each padded to `padded` rows.
struct Piece {
  int64_t row, count, padded, columns = 0;
  Run runs[2];
  int number;
  Piece(const Sequence& one, int64_t at, int64_t block) : row(one.row + at), count(std::min(block, one.rows - at)) {
    padded = whole(count, BACKWARD_ROWS);
    number = runs_of(one, at, count, runs);
    for (int r = 0; r < number; ++r) columns += runs[r].blocks * KEYS;
  }
};

// A piece's queries and gradients by pairs of rows, as the gradients of keys and values want them.
void pair_rows(const Given& given, const Piece& piece, int64_t head, int64_t before, Word* q_paired, Word* grad_paired) {
  const auto pair = [&](const Rows& x, int64_t width, int64_t i, Word* to) {
    const Half* first = i < piece.count ? x.at(piece.row + i, head) : nullptr;
    const Half* second = i + 1 < piece.count ? x.at(piece.row + i + 1, head) : nullptr;
    interleave(first, second, width, to + (before + i) / 2 * width);
  };
  for (int64_t i = 0; i < piece.padded; i += 2) {
    pair(given.q, given.shape.width, i, q_paired);
    pair(given.grad, given.shape.out_width, i, grad_paired);
  }
}

// Probabilities p and ds = p (dO v^T - delta) of rows [i0, i0 + M) of a piece's head: both by pairs of rows, ds as it stands too.
void slopes(const Given& given, const Piece& piece, int64_t head, int64_t i0, int64_t before, const Word* keys, const Word* values,
            Word* p_paired, Word* ds_paired, Half* ds) {
  constexpr int M = BACKWARD_ROWS;
  const int64_t width = given.shape.width, out_width = given.shape.out_width, place = before + i0, columns = piece.columns;
  const Word *queries[M], *grads[M];
  float offset[M], delta[M];
  for (int i = 0; i < M; ++i) {
    const int64_t row = piece.row + std::min(i0 + i, piece.count - 1);
    queries[i] = (const Word*)given.q.at(row, head), grads[i] = (const Word*)given.grad.at(row, head);
    offset[i] = -given.lse[head * given.tokens + row];
    delta[i] = dot(given.grad.at(row, head), given.out.at(row, head), out_width);
  }
  int64_t column = 0;
  for (int r = 0; r < piece.number; ++r)
    for (int64_t b = 0; b < piece.runs[r].blocks; ++b, column += KEYS) {
      __m512 c[M][4];
      alignas(64) float p[M][KEYS];
      clear(c);
      multiply<M, 4>(c, queries, 1, keys + (piece.runs[r].column + b * KEYS) * width / 2, KEYS, width / 2);
      for (int i = 0; i < M; ++i)
        for (int j = 0; j < 4; ++j) {
          const int64_t seen = i0 + i < piece.count ? piece.runs[r].seen(i0 + i) - b * KEYS - j * VECTOR : 0;
          const __m512 low = _mm512_fmadd_ps(c[i][j], _mm512_set1_ps(given.shape.scale), _mm512_set1_ps(offset[i]));
          const __mmask16 counts = _mm512_mask_cmp_ps_mask(lanes(seen), low, _mm512_set1_ps(-87.0f), _CMP_NLE_UQ);
          _mm512_store_ps(p[i] + j * VECTOR, _mm512_maskz_mov_ps(counts, exp_of(_mm512_maskz_mov_ps(counts, low))));
        }
      clear(c);
      multiply<M, 4>(c, grads, 1, values + (piece.runs[r].column + b * KEYS) * out_width / 2, KEYS, out_width / 2);
      for (int i = 0; i < M; i += 2)
        for (int j = 0; j < 4; ++j) {
          __m512i p_half[2], ds_half[2];
          for (int side = 0; side < 2; ++side) {
            const __m512 x = _mm512_load_ps(p[i + side] + j * VECTOR);
            const __m256i slope = to_half(_mm512_mul_ps(x, _mm512_sub_ps(c[i + side][j], _mm512_set1_ps(delta[i + side]))));
            _mm256_storeu_si256((__m256i*)(ds + (place + i + side) * columns + column + j * VECTOR), slope);
            p_half[side] = _mm512_cvtepu16_epi32(to_half(x)), ds_half[side] = _mm512_cvtepu16_epi32(slope);
          }
          const int64_t at = (place + i) / 2 * columns + column + j * VECTOR;
          _mm512_store_si512(p_paired + at, _mm512_or_si512(p_half[0], _mm512_slli_epi32(p_half[1], 16)));
          _mm512_store_si512(ds_paired + at, _mm512_or_si512(ds_half[0], _mm512_slli_epi32(ds_half[1], 16)));
        }
    }
}

// scale ds k of rows [i0, i0 + M) of a piece's head.
void query_grads(const Given& given, const Piece& piece, int64_t head, int64_t i0, const Half* ds, const Word* keys_paired) {
  Run seen[2] = {piece.runs[0], piece.runs[1]};
  for (int r = 0; r < piece.number; ++r)
    if (seen[r].is_causal) seen[r].first += i0;
  over_keys<BACKWARD_ROWS>((const Word*)ds, piece.columns / 2, seen, piece.number, keys_paired, given.shape.width,
                           [&](int i, int64_t d, __m512 x) {
                             if (i0 + i >= piece.count) return;
                             Half* to = given.dq.at(piece.row + i0 + i, head) + d;
                             _mm256_storeu_si256((__m256i*)to, to_half(_mm512_mul_ps(x, _mm512_set1_ps(given.shape.scale))));
                           });
}

// What was summed for a group's keys or values, scaled and rounded.
void round_sums(const Group& group, const float* sums, int64_t width, float scale, const Rows& to, int64_t head) {
  for (const Sequence& one : group.sequences)
    for (int64_t i = 0; i < one.rows; ++i)
      for (int64_t d = 0; d < width; d += VECTOR) {
        const __m512 x = _mm512_mul_ps(_mm512_load_ps(sums + (one.column + i) * width + d), _mm512_set1_ps(scale));
        _mm256_storeu_si256((__m256i*)(to.at(one.row + i, head) + d), to_half(x));
      }
}

// What threads share: query heads of one key head in one group. sums: where its part of dK and dV stays, if others have parts too.
struct Task {
  int64_t group, head, heads;
  float* sums;
};

// A task's part of dK and dV, float32, and dQ. of_k (columns, width), of_v (columns, out_width), both cleared here.
void backward_sums(const Given& given, const Group& group, const Task& task, float* of_k, float* of_v) {
  thread_local Scratch scratch;
  const int64_t width = given.shape.width, out_width = given.shape.out_width;
  const int64_t kv_head = task.head / (given.shape.heads / given.shape.kv_heads);
  const int64_t block = std::max<int64_t>(16, whole(BLOCK_ROWS / task.heads, BACKWARD_ROWS)), most_rows = task.heads * block;
  Word* keys_turned = scratch.keys_turned.get(group.columns * width / 2);
  Word* keys_paired = scratch.keys_paired.get(group.columns / 2 * width);
  Word* values_turned = scratch.values_turned.get(group.columns * out_width / 2);
  lay_out(group, given.k, kv_head, width, keys_turned, keys_paired);
  lay_out(group, given.v, kv_head, out_width, values_turned, nullptr);
  std::memset(of_k, 0, sizeof(float) * group.columns * width);
  std::memset(of_v, 0, sizeof(float) * group.columns * out_width);
  Word* p_paired = scratch.p_paired.get(most_rows / 2 * group.columns);
  Word* ds_paired = scratch.ds_paired.get(most_rows / 2 * group.columns);
  Half* ds = scratch.ds.get(most_rows * group.columns);
  Word* q_paired = scratch.q_paired.get(most_rows / 2 * width);
  Word* grad_paired = scratch.grad_paired.get(most_rows / 2 * out_width);
  for (const Sequence& one : group.sequences)
    for (int64_t at = 0; at < one.rows; at += block) {
      const Piece piece(one, at, block);
      for (int64_t i = 0; i < task.heads; ++i) {
        const int64_t head = task.head + i, before = i * piece.padded;
        pair_rows(given, piece, head, before, q_paired, grad_paired);
        for (int64_t i0 = 0; i0 < piece.padded; i0 += BACKWARD_ROWS) {
          slopes(given, piece, head, i0, before, keys_turned, values_turned, p_paired, ds_paired, ds);
          query_grads(given, piece, head, i0, ds + (before + i0) * piece.columns, keys_paired);
        }
      }
      const int64_t pairs = task.heads * piece.padded / 2;
      add_over_rows(p_paired, piece.columns, piece.runs, piece.number, grad_paired, pairs, out_width, of_v);
      add_over_rows(ds_paired, piece.columns, piece.runs, piece.number, q_paired, pairs, width, of_k);
    }
}

void round_both(const Given& given, const Group& group, int64_t kv_head, const float* of_k, const float* of_v) {
  round_sums(group, of_k, given.shape.width, given.shape.scale, given.dk, kv_head);
  round_sums(group, of_v, given.shape.out_width, 1.0f, given.dv, kv_head);
}

void backward_task(const Given& given, const Group& group, const Task& task) {
  thread_local Buffer<float> keys, values;
  if (task.sums) return backward_sums(given, group, task, task.sums, task.sums + group.columns * given.shape.width);
  float *of_k = keys.get(group.columns * given.shape.width), *of_v = values.get(group.columns * given.shape.out_width);
  backward_sums(given, group, task, of_k, of_v);
  round_both(given, group, task.head / task.heads, of_k, of_v);
}

// The parts of dK and dV of one key head that its query heads left, added in their order.
void add_parts(const Given& given, const Group& group, int64_t kv_head, float* parts) {
  const int64_t size = group.columns * (given.shape.width + given.shape.out_width);
  for (int64_t part = 1; part < given.shape.heads / given.shape.kv_heads; ++part)
    for (int64_t i = 0; i < size; i += VECTOR)
      _mm512_store_ps(parts + i, _mm512_add_ps(_mm512_load_ps(parts + i), _mm512_load_ps(parts + part * size + i)));
  round_both(given, group, kv_head, parts, parts + group.columns * given.shape.width);
}

// Every query head of a group of middling size, and every key head of others: small groups share what is laid out, and of very
// long ones the parts would take too much memory. It depends on the group alone, and so do its bits.
std::vector<Task> tasks_of(const Given& given, const std::vector<Group>& groups, float* sums) {
  const int64_t repeats = given.shape.heads / given.shape.kv_heads;
  std::vector<Task> tasks;
  for (size_t i = 0; i < groups.size(); ++i) {
    const int64_t heads = groups[i].is_split && repeats > 1 ? 1 : repeats;
    for (int64_t head = 0; head < given.shape.heads; head += heads) {
      tasks.push_back({int64_t(i), head, heads, heads == repeats ? nullptr : sums});
      if (sums && heads != repeats) sums += groups[i].columns * (given.shape.width + given.shape.out_width);
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) {
    return groups[a.group].cells * double(a.heads) > groups[b.group].cells * double(b.heads);
  });
  return tasks;
}

std::vector<Group> read_groups(const int64_t* layout, int64_t number) {
  std::vector<Group> groups;
  for (int64_t i = 0; i < number; ++i) {
    groups.push_back(read_group(layout));
    groups.back().is_split = groups.back().tokens >= SPLIT_FROM && groups.back().tokens <= SPLIT_TO;
  }
  return groups;
}

// sizes: heads, kv heads, width of queries and keys, width of values, tokens, groups. strides: token and head of q, k and v.
Given given_of(void* q, void* k, void* v, void* out, float* lse, const int64_t* sizes, const int64_t* strides, float scale) {
  const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], scale};
  return {.shape = shape,
          .tokens = sizes[4],
          .q = {(Half*)q, strides[0], strides[1]},
          .k = {(Half*)k, strides[2], strides[3]},
          .v = {(Half*)v, strides[4], strides[5]},
          .out = {(Half*)out, shape.heads * shape.out_width, shape.out_width},
          .lse = lse,
          .grad = {},
          .dq = {},
          .dk = {},
          .dv = {}};
}

}  // namespace

// layout: for each group its first row, the prompt's tokens, the number of completions, their tokens.
extern "C" void preftune_attention_forward(void* q, void* k, void* v, void* out, float* lse, const int64_t* sizes,
                                           const int64_t* strides, const int64_t* layout, float scale) {
  const Given given = given_of(q, k, v, out, lse, sizes, strides, scale);
  const std::vector<Group> groups = read_groups(layout, sizes[5]);
  const std::vector<Task> tasks = tasks_of(given, groups, nullptr);
#pragma omp parallel for schedule(dynamic, 1)
  for (size_t i = 0; i < tasks.size(); ++i) forward_task(given, groups[tasks[i].group], tasks[i].head, tasks[i].heads);
}

// As above, and strides go on: token and head of the gradient of the output.
extern "C" void preftune_attention_backward(void* q, void* k, void* v, void* out, float* lse, void* grad, void* dq, void* dk, void* dv,
                                            const int64_t* sizes, const int64_t* strides, const int64_t* layout, float scale) {
  Given given = given_of(q, k, v, out, lse, sizes, strides, scale);
  const Shape& shape = given.shape;
  given.grad = {(Half*)grad, strides[6], strides[7]};
  given.dq = {(Half*)dq, shape.heads * shape.width, shape.width};
  given.dk = {(Half*)dk, shape.kv_heads * shape.width, shape.width};
  given.dv = {(Half*)dv, shape.kv_heads * shape.out_width, shape.out_width};
  const std::vector<Group> groups = read_groups(layout, sizes[5]);
  thread_local Buffer<float> parts;
  int64_t columns = 0;
  for (const Group& group : groups) columns += group.is_split ? group.columns : 0;
  float* sums = parts.get(columns * given.shape.heads * (given.shape.width + given.shape.out_width));
  const std::vector<Task> tasks = tasks_of(given, groups, sums);
  std::vector<Task> firsts;  // of those that left parts
  for (const Task& task : tasks)
    if (task.sums && task.head % (given.shape.heads / given.shape.kv_heads) == 0) firsts.push_back(task);
#pragma omp parallel
  {
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); ++i) backward_task(given, groups[tasks[i].group], tasks[i]);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < firsts.size(); ++i)
      add_parts(given, groups[firsts[i].group], firsts[i].head / (given.shape.heads / given.shape.kv_heads), firsts[i].sums);
  }
}
