// What is compiled once per instruction set.
#pragma once

#include <cstdint>

namespace shoal {

// Weights are held in tiles of so many rows, and in groups of so many columns.
constexpr int kTile = 16;
constexpr int kGroup = 32;
constexpr int kMostBlockRows = 8;
// Of scores that are held at a time: queries times the heads that share a kv head.
constexpr int kMostRows = 128;

// A group of a tile: 4-bit codes, then float16 scales and minimums.
struct Group4 {
  static constexpr bool kHasMinimums = true;
  static constexpr int kScalesAt = kTile * kGroup / 2;
  static constexpr int kMinimumsAt = kScalesAt + kTile * 2;
  static constexpr int kBytes = kMinimumsAt + kTile * 2;
};

// Or 8-bit codes, then scales.
struct Group8 {
  static constexpr bool kHasMinimums = false;
  static constexpr int kScalesAt = kTile * kGroup;
  static constexpr int kBytes = kScalesAt + kTile * 2;
};

enum class Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

// What a KV cache holds its numbers in; 8-bit codes of a head are followed by a float16 step for each
// kStepGroup of them.
enum class CacheType : int { kFloat32 = 0, kFloat16 = 1, kInt8 = 2 };
constexpr int kNumCacheTypes = 3;

constexpr int kStepGroup = 64;

constexpr int64_t head_bytes(CacheType type, int head_dim) {
  if (type == CacheType::kInt8) return head_dim + (head_dim + kStepGroup - 1) / kStepGroup * 2;
  return int64_t{head_dim} * (type == CacheType::kFloat16 ? 2 : 4);
}

// Keys are attended to in spans of so many, by their positions: what a row gets of a span depends on
// nothing but the two, so that spans may be done in any order, by any thread.
constexpr int kSpan = 256;
// From a row of scores to the next: rows of a power of two would push each other out of a core's cache.
constexpr int kScoresStride = kSpan + 16;

// Of so many numbers that follow one another, the largest of each lane of a vector is kept.
constexpr int kPeakGroup = 128;

constexpr int64_t num_peaks(int64_t width) { return (width + kPeakGroup - 1) / kPeakGroup * 8; }

// So many keys' values stay in a core's first cache while all rows pass by.
constexpr int kKeysAtOnce = 32;

// A group of a block of rows: four codes of each row lie beside each other, then the next four; a
// scale for each row; `sums` are of what its codes stand for, `totals` of the codes themselves.
struct CodesAt {
  int8_t* codes;
  float* scales;
  float* sums;
  int32_t* totals;

  CodesAt row(int row) const { return {codes + 4 * row, scales + row, sums + row, totals + row}; }
  // The one so many groups behind, of a block of so many rows.
  CodesAt group(int64_t number, int num_rows) const {
    const int64_t at = number * num_rows;
    return {codes + at * kGroup, scales + at, sums + at, totals + at};
  }
};

// Activations of `num_rows` rows in 8 bits, in blocks of an instruction set's `block_rows`, the last one
// of what is left; the groups of a block follow one another.
struct Codes {
  CodesAt start;
  int64_t num_rows;
  int64_t num_groups;

  CodesAt block(int64_t first_row) const { return start.group(first_row, num_groups); }
};

// y [num_rows, up to kTile] of one tile, on top of `bias` and of rows `onto`; both may be null.
struct TileOut {
  float* y;
  int64_t stride;
  int width;
  const float* bias;
  const float* onto;
  int64_t onto_stride;
};

// Queries of one sequence, one after the other, over some kv heads: q and out [num_queries,
// num_kv_heads, num_heads, head_dim], tokens so many floats apart. Keys lie in a cache whose slots are
// `slot_bytes` apart; `slots` says where, from the sequence's first token on.
struct HeadQueries {
  const float* q;
  int64_t q_stride;
  float* out;
  int64_t out_stride;
  int num_queries;
  int num_kv_heads;
  int num_heads;  // that share a kv head
  int head_dim;
  const uint8_t* keys;
  const uint8_t* values;
  int64_t slot_bytes;
  const int64_t* slots;
  int64_t position;  // of the first query: it sees keys up to its own
  int64_t window;    // how many of them at most; 0: all
  float scale;
  float softcap;  // 0: none

  int64_t stop(int query) const { return position + query + 1; }
  int64_t last() const { return stop(num_queries - 1) - 1; }  // key that a query sees
  int64_t first(int query) const {
    return window == 0 || window > stop(query) ? 0 : stop(query) - window;
  }
  int64_t first_span() const { return first(0) / kSpan; }
  int64_t num_spans() const { return last() / kSpan + 1 - first_span(); }
  // A row is a query and a head: [num_kv_heads, num_queries, num_heads].
  int num_rows() const { return num_kv_heads * num_queries * num_heads; }
  // What a span gives to a row: the sum of its values by weight, the largest score, the weights' sum.
  int share_floats() const { return head_dim + 8; }
  int64_t span_floats() const { return int64_t{num_rows()} * share_floats(); }
  int64_t scratch_floats() const {
    return int64_t{num_rows()} * kScoresStride + int64_t{kKeysAtOnce} * head_dim;
  }
};

struct Isa {
  const char* name;
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t width, float* out);
  void (*gate)(const float* gate, const float* up, Activation activation, int64_t width,
               float* out);
  // So many rows share each weight that is unpacked, as many as leave their sums in registers; four
  // or eight.
  int block_rows;
  // The rows of a block; `width` may end within a group: the rest of it is zero.
  void (*quantize)(const float* const* rows, int64_t width, int num_rows, CodesAt block);
  void (*tile4)(const uint8_t* tile, const Codes& x, const TileOut& out);
  void (*tile8)(const uint8_t* tile, const Codes& x, const TileOut& out);
  // A token's heads, x [num_heads, head_dim], `head_dim` a multiple of 8; by CacheType, as below.
  void (*store[kNumCacheTypes])(const float* x, int num_heads, int head_dim, uint8_t* to);
  // The shares [num_rows] of a span, counted from first_span() on; `scratch` has scratch_floats().
  void (*attend[kNumCacheTypes])(const HeadQueries& queries, int64_t span, float* scratch,
                                 float* shares);
  // The shares of all spans [num_spans, num_rows] to `out`.
  void (*combine)(const HeadQueries& queries, const float* shares);
  // Element i of a head turns with element i + head_dim / 2.
  void (*rotate)(float* x, int num_heads, int head_dim, const float* cos, const float* sin);
  // num_peaks(width) of them, each the largest of up to 16 numbers; returns the largest of all, or
  // no number if x holds one that is none.
  float (*find_peaks)(const float* x, int64_t width, float* peaks);
  // e^((x - peak) / temperature) for x up to `peak`; returns their sum.
  double (*weigh)(const float* x, int64_t width, float peak, float temperature, float* weights);
  // Where x is at least so much, in order; returns at how many places.
  int64_t (*find)(const float* x, int64_t width, float least, int32_t* places);
  // Of those in [least, below).
  double (*sum_between)(const float* x, int64_t width, float least, float below);
};

extern const Isa kPlain;
#ifdef SHOAL_X86
extern const Isa kAvx2;
extern const Isa kAvx512Vnni;
#endif

}  // namespace shoal
