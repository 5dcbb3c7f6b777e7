// A pack's groups as trees of causal sequences, the keys that a sequence's rows see, and keys laid out for products.
#include "tiles.h"

namespace {

constexpr int64_t KEYS = 64;    // keys of a block

struct Shape {
  int64_t heads, kv_heads, width, out_width;
  float scale;
};

struct Sequence {  // rows that see `prompt` keys of the chain and then their own, the first of which lie at column `column`
  int64_t row, rows, prompt, column;
};

struct Group {
  int64_t columns = 0, tokens = 0;  // columns: of all sequences, each padded to whole blocks
  double cells = 0;
  bool is_split = false;  // whether query heads of one key head are tasks of their own
  std::vector<Sequence> sequences;
};

struct Run {  // blocks of keys that follow each other: the first column, their number, and how many keys row 0 sees of them
  int64_t column, blocks, first;
  bool is_causal;  // row i sees i keys more than row 0; otherwise all rows see `first`
  int64_t seen(int64_t row) const { return is_causal ? first + row : first; }
};

inline Group read_group(const int64_t*& at) {
  Group group;
  const int64_t start = *at++, prompt = *at++, number = *at++;
  int64_t row = start;
  for (int64_t i = 0; i < number; ++i) {
    const int64_t own = *at++, rows = i == 0 ? prompt + own : own, before = i == 0 ? 0 : prompt;
    if (rows > 0) group.sequences.push_back({row, rows, before, group.columns});
    group.columns += whole(rows, KEYS);
    group.cells += double(rows) * (double(before) + double(rows) / 2);
    row += rows;
    group.tokens += rows;
  }
  return group;
}

// The runs of keys that rows [first, first + count) of a sequence see; at most two.
inline int runs_of(const Sequence& sequence, int64_t first, int64_t count, Run* runs) {
  int number = 0;
  if (sequence.prompt > 0) runs[number++] = {0, whole(sequence.prompt, KEYS) / KEYS, sequence.prompt, false};
  runs[number++] = {sequence.column, whole(first + count, KEYS) / KEYS, first + 1, true};
  return number;
}

// The words of up to 64 rows, word by word: to[word][row].
inline void turn(const Rows& x, int64_t head, int64_t row, int64_t count, int64_t words, Word* to) {
  for (int64_t i = 0; i < KEYS; ++i) {
    const Word* from = i < count ? (const Word*)x.at(row + i, head) : nullptr;
    for (int64_t w = 0; w < words; ++w) to[w * KEYS + i] = from ? from[w] : 0;
  }
}

// Keys or values of every sequence of a group: turned block by block, [block][width / 2][64], or paired, [columns / 2][width].
inline void lay_out(const Group& group, const Rows& x, int64_t head, int64_t width, Word* turned, Word* paired) {
  for (const Sequence& one : group.sequences) {
    for (int64_t at = 0; at < one.rows; at += KEYS) {
      const int64_t count = std::min(KEYS, one.rows - at);
      if (turned) turn(x, head, one.row + at, count, width / 2, turned + (one.column + at) * width / 2);
      for (int64_t i = 0; paired && i < KEYS; i += 2) {
        const Half* first = i < count ? x.at(one.row + at + i, head) : nullptr;
        const Half* second = i + 1 < count ? x.at(one.row + at + i + 1, head) : nullptr;
        interleave(first, second, width, paired + (one.column + at + i) / 2 * width);
      }
    }
  }
}

}  // namespace
