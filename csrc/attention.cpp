#include "attention.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "matrix.h"
#include "pool.h"

namespace shoal {

namespace {

// Less than so many floats to move or turn are not worth a second thread.
constexpr int64_t kWorthSharing = 1 << 15;

// `each(first, stop)` over parts of [0, count), one part if all of it is little work.
template <class Each>
void share(int64_t count, int64_t floats_each, const Each& each) {
  const int64_t wanted = count * floats_each < kWorthSharing ? 1 : 4 * pool().num_threads();
  const int64_t num_parts = std::min<int64_t>(wanted, count);
  pool().run(static_cast<uint32_t>(num_parts), [&](uint32_t part) {
    each(part * count / num_parts, (part + 1) * count / num_parts);
  });
}

// Queries of one sequence that are done together: each key that is read serves them all.
constexpr int64_t kQueriesAtOnce = 8;

// A line of a processor's cache: vectors that cross none are read and written faster.
struct alignas(64) Line {
  float values[16];
};

void attend_some(const Cache& cache, const Queries& queries, int64_t sequence, int64_t first,
                 int64_t count, int kv_head) {
  const int num_heads = queries.num_heads / cache.num_kv_heads;
  const int64_t at_head = int64_t{kv_head} * num_heads * cache.head_dim;
  const int64_t row = sequence * queries.num_queries + first;
  const int64_t out_stride = int64_t{queries.num_heads} * cache.head_dim;
  const HeadQueries some = {
      queries.q + row * queries.q_stride + at_head,
      queries.q_stride,
      queries.out + row * out_stride + at_head,
      out_stride,
      static_cast<int>(count),
      num_heads,
      cache.head_dim,
      cache.keys + kv_head * cache.head_bytes(),
      cache.values + kv_head * cache.head_bytes(),
      cache.slot_bytes(),
      queries.slots + sequence * queries.width,
      queries.positions[row],
      queries.window,
      queries.scale,
      queries.softcap,
  };
  thread_local std::vector<Line> scores;
  const int64_t num_floats = count * num_heads * some.scores_width() + kKeysAtOnce * cache.head_dim;
  scores.resize((num_floats + 15) / 16);
  isa().attend[static_cast<int>(cache.type)](some, scores.data()->values);
}

void check(const Cache& cache, const int64_t* slots, int64_t count) {
  bool fits = true;
  for (int64_t i = 0; i < count; ++i) fits &= slots[i] >= 0 && slots[i] < cache.num_slots;
  if (!fits) throw std::out_of_range("a slot that the KV cache does not have");
}

void check(const Cache& cache, const Queries& queries) {
  for (int64_t sequence = 0; sequence < queries.num_sequences; ++sequence) {
    const int64_t last = queries.positions[(sequence + 1) * queries.num_queries - 1];
    if (last >= queries.width) throw std::out_of_range("a query beyond its sequence's slots");
    check(cache, queries.slots + sequence * queries.width, last + 1);
  }
}

}  // namespace

void store(const Cache& cache, const float* k, int64_t k_stride, const float* v, int64_t v_stride,
           const int64_t* slots, int64_t num_tokens) {
  check(cache, slots, num_tokens);
  const int num_heads = cache.num_kv_heads, head_dim = cache.head_dim;
  const auto store_heads = isa().store[static_cast<int>(cache.type)];
  share(num_tokens, int64_t{2} * num_heads * head_dim, [&](int64_t first, int64_t stop) {
    for (int64_t token = first; token < stop; ++token) {
      const int64_t at = slots[token] * cache.slot_bytes();
      store_heads(k + token * k_stride, num_heads, head_dim, cache.keys + at);
      store_heads(v + token * v_stride, num_heads, head_dim, cache.values + at);
    }
  });
}

void attend(const Cache& cache, const Queries& queries) {
  check(cache, queries);
  const int num_heads = queries.num_heads / cache.num_kv_heads;
  const int64_t at_once = std::clamp<int64_t>(kMostRows / num_heads, 1, kQueriesAtOnce);
  const int64_t num_tiles = (queries.num_queries + at_once - 1) / at_once;
  const int64_t num_parts = queries.num_sequences * num_tiles * cache.num_kv_heads;
  pool().run(static_cast<uint32_t>(num_parts), [&](uint32_t part) {
    // The last queries see the most keys: they begin, so that nobody waits for them in the end.
    const int64_t tile = num_tiles - 1 - part / cache.num_kv_heads % num_tiles;
    const int64_t count = std::min(at_once, queries.num_queries - tile * at_once);
    attend_some(cache, queries, part / (cache.num_kv_heads * num_tiles), tile * at_once, count,
                part % cache.num_kv_heads);
  });
}

void rotate(float* x, int64_t stride, int64_t num_tokens, int num_heads, int head_dim,
            const float* cos, const float* sin) {
  share(num_tokens, int64_t{num_heads} * head_dim, [&](int64_t first, int64_t stop) {
    for (int64_t token = first; token < stop; ++token) {
      isa().rotate(x + token * stride, num_heads, head_dim, cos + token * head_dim,
                   sin + token * head_dim);
    }
  });
}

}  // namespace shoal
