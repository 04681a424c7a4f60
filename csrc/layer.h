// The halves of a decoder layer, each in one call, and whole layers: between small calls lie
// microseconds of Python, and a step of one token has hundreds of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "attention.h"
#include "matrix.h"
#include "ranks.h"
#include "step.h"

namespace shoal {

struct Norm {
  const float* weight;
  float eps;
};

struct Linear {
  Matrix matrix;
  const float* bias;
};

// x [num_tokens, hidden], rows `stride` floats apart, to y [num_tokens, hidden] without gaps. What a
// half makes of x is added to `onto`, null or x.
struct Hidden {
  const float* x;
  int64_t stride;
  int64_t num_tokens;
  float* y;
  const float* onto;
};

struct Rotation {
  const float* cos;  // [num_tokens, head_dim]
  const float* sin;
};

// From the norm before the queries, keys and values to what attention adds to x.
struct AttentionHalf {
  Norm norm;
  Linear qkv;
  Norm head_norm;  // of queries and keys, a row of weights for each head; weight null: none
  Linear output;
  int num_heads;
  int num_kv_heads;
  int head_dim;
  float scale;
  int64_t window;
  float softcap;

  void run(const Hidden& hidden, const Rotation& rotation, const Cache& cache,
           const Step& step) const;

  // Its parts. Queries, keys and values [num_tokens, qkv], of which the cache now holds the last two;
  // of rows that attend [num_tokens, num_heads, head_dim]: both are the thread's till it calls again.
  float* store(const Hidden& hidden, const Rotation& rotation, const Cache& cache,
               const Step& step) const;
  float* attend(const float* qkv, const Cache& cache, const Step& step) const;
  void project(const float* attended, const Hidden& hidden) const;
};

// From the norm before gate and up to what the MLP adds to x.
struct MlpHalf {
  Norm norm;
  Linear gate_up;
  Activation activation;
  Linear down;

  void run(const Hidden& hidden) const;
};

// Layers that follow one another, each half plainly added to x: alone, or what all ranks' halves, of which
// these are one's, make of it together.
struct Layers {
  struct Layer {
    AttentionHalf attention;
    MlpHalf mlp;
    size_t rope;  // which of these
  };

  std::vector<Rope> ropes;
  std::vector<Layer> layers;

  // x and y [num_tokens, hidden], rows of x `stride` floats apart; a cache for each layer. Of what the last
  // layer makes only the rows `read`, ascending, come to y, without gaps; null: all. `ranks` are null for
  // who is alone; their rows of x have no gaps.
  void run(const float* x, int64_t stride, int64_t num_tokens, float* y,
           const std::vector<const Cache*>& caches, const Step& step,
           const std::vector<int64_t>* read, Ranks* ranks) const;
};

}  // namespace shoal
