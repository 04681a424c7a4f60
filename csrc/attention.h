// Attention of single queries over a paged cache, and the turning of heads by their position.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace shoal {

// Of one layer: [num_slots, num_kv_heads, head_dim] each, as `type` says.
struct Cache {
  CacheType type;
  uint8_t* keys;
  uint8_t* values;
  int64_t num_slots;
  int num_kv_heads;
  int head_dim;

  int64_t head_bytes() const { return shoal::head_bytes(type, head_dim); }
  int64_t slot_bytes() const { return num_kv_heads * head_bytes(); }
};

// Throws std::out_of_range for a slot that the cache has not, here and below.
// k and v [num_tokens, num_kv_heads, head_dim], tokens so many floats apart, to `slots`.
void store(const Cache& cache, const float* k, int64_t k_stride, const float* v, int64_t v_stride,
           const int64_t* slots, int64_t num_tokens);

// Queries that follow one another in each of some sequences: q and out [num_sequences *
// num_queries, num_heads, head_dim], q's tokens `q_stride` floats apart. `slots` [num_sequences,
// width] says where a sequence's tokens lie, `positions` [num_sequences, num_queries] which of them
// a query is: it sees those before it and itself, or the last `window` of these if that is not 0.
struct Queries {
  const float* q;
  int64_t q_stride;
  float* out;
  int64_t num_sequences;
  int64_t num_queries;
  int num_heads;
  const int64_t* slots;
  int64_t width;
  const int64_t* positions;
  float scale;
  int64_t window;
  float softcap;
};

void attend(const Cache& cache, const Queries& queries);

// Angles are positions times `frequencies` [head_dim / 2], in float32; cos and sin are scaled.
struct Rope {
  const float* frequencies;
  int head_dim;
  float scaling;
};

// cos and sin [positions, head_dim]; the first half of sin is negated, as turning wants it.
void find_turns(const Rope& rope, const std::vector<int64_t>& positions, float* cos, float* sin);

// In place, x [num_tokens, num_heads, head_dim]; cos and sin [num_tokens, head_dim].
void rotate(float* x, int64_t stride, int64_t num_tokens, int num_heads, int head_dim,
            const float* cos, const float* sin);

}  // namespace shoal
