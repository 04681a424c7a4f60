#include "attention.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "matrix.h"
#include "pool.h"
#include "room.h"

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
constexpr int64_t kQueriesAtOnce = 16;
// Rows that leave room for their scores in a core's first cache.
constexpr int64_t kRowsTogether = 32;

// A line of a processor's cache: vectors that cross none are read and written faster.
struct alignas(64) Line {
  float values[16];
};

float* lines_of(Room<Line>& room, int64_t num_floats) {
  return room.of((num_floats + 15) / 16)->values;
}

// Tiles of queries times groups of kv heads, of each sequence.
class Tiles {
 public:
  Tiles(const Cache& cache, const Queries& queries) : cache_(cache), queries_(queries) {
    num_heads_ = queries.num_heads / cache.num_kv_heads;
    queries_at_once_ = std::clamp<int64_t>(kMostRows / num_heads_, 1, kQueriesAtOnce);
    num_tiles_ = (queries.num_queries + queries_at_once_ - 1) / queries_at_once_;
  }

  // Neighbours in memory, as many as leave no thread with more to do; of each tile come `num_spans`.
  void join_heads(int64_t num_spans) {
    const int64_t rows = num_heads_ * std::min(queries_at_once_, queries_.num_queries);
    const int64_t most = std::clamp<int64_t>(kRowsTogether / rows, 1, cache_.num_kv_heads);
    int64_t least_work = work_of_one(num_spans);
    for (Tiles joined = *this; joined.heads_at_once_ <= most; ++joined.heads_at_once_) {
      if (joined.work_of_one(num_spans) > least_work) continue;
      least_work = joined.work_of_one(num_spans);
      heads_at_once_ = joined.heads_at_once_;
    }
  }

  int64_t num_groups() const {
    return (cache_.num_kv_heads + heads_at_once_ - 1) / heads_at_once_;
  }
  int64_t size() const { return queries_.num_sequences * num_tiles_ * num_groups(); }

  // The last queries see the most keys: they begin, so that nobody waits for them in the end.
  HeadQueries at(int64_t index) const {
    const int64_t tile = num_tiles_ - 1 - index / num_groups() % num_tiles_;
    return queries_of(index / (num_groups() * num_tiles_), tile * queries_at_once_,
                      index % num_groups() * heads_at_once_);
  }

 private:
  // Heads of a span that the busiest thread does.
  int64_t work_of_one(int64_t num_spans) const {
    const int num_threads = pool().num_threads();
    return (size() * num_spans + num_threads - 1) / num_threads * heads_at_once_;
  }
  HeadQueries queries_of(int64_t sequence, int64_t first, int64_t kv_head) const;

  const Cache& cache_;
  const Queries& queries_;
  int num_heads_;
  int64_t queries_at_once_;
  int64_t num_tiles_;
  int64_t heads_at_once_ = 1;
};

HeadQueries Tiles::queries_of(int64_t sequence, int64_t first, int64_t kv_head) const {
  const int64_t at_head = kv_head * num_heads_ * cache_.head_dim;
  const int64_t row = sequence * queries_.num_queries + first;
  const int64_t out_stride = int64_t{queries_.num_heads} * cache_.head_dim;
  return {
      queries_.q + row * queries_.q_stride + at_head,
      queries_.q_stride,
      queries_.out + row * out_stride + at_head,
      out_stride,
      static_cast<int>(std::min(queries_at_once_, queries_.num_queries - first)),
      static_cast<int>(std::min(heads_at_once_, cache_.num_kv_heads - kv_head)),
      num_heads_,
      cache_.head_dim,
      cache_.keys + kv_head * cache_.head_bytes(),
      cache_.values + kv_head * cache_.head_bytes(),
      cache_.slot_bytes(),
      queries_.slots + sequence * queries_.width,
      queries_.positions[row],
      queries_.window,
      queries_.scale,
      queries_.softcap,
  };
}

void attend_span(CacheType type, const HeadQueries& queries, int64_t span, float* shares) {
  thread_local Room<Line> scratch;
  isa().attend[static_cast<int>(type)](
      queries, span, lines_of(scratch, queries.scratch_floats()), shares);
}

void attend_all(CacheType type, const HeadQueries& queries) {
  thread_local Room<Line> memory;
  const int64_t num_spans = queries.num_spans();
  float* shares = lines_of(memory, num_spans * queries.span_floats());
  for (int64_t span = 0; span < num_spans; ++span) {
    attend_span(type, queries, span, shares + span * queries.span_floats());
  }
  isa().combine(queries, shares);
}

// For few tiles: all threads share the spans of each.
void attend_by_spans(CacheType type, const Tiles& tiles, int64_t most_spans) {
  thread_local Room<Line> memory;
  int64_t most_floats = 0;
  for (int64_t i = 0; i < tiles.size(); ++i) {
    most_floats = std::max(most_floats, tiles.at(i).span_floats() * most_spans);
  }
  float* shares = lines_of(memory, tiles.size() * most_floats);
  pool().run(static_cast<uint32_t>(tiles.size() * most_spans), [&](uint32_t part) {
    const HeadQueries queries = tiles.at(part / most_spans);
    const int64_t span = part % most_spans;
    if (span >= queries.num_spans()) return;
    attend_span(type, queries, span,
                shares + part / most_spans * most_floats + span * queries.span_floats());
  });
  pool().run(static_cast<uint32_t>(tiles.size()), [&](uint32_t index) {
    isa().combine(tiles.at(index), shares + index * most_floats);
  });
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
  Tiles tiles(cache, queries);
  int64_t most_spans = 0;
  for (int64_t i = 0; i < tiles.size(); ++i) most_spans = std::max(most_spans, tiles.at(i).num_spans());
  tiles.join_heads(most_spans);
  const int64_t enough = 4 * pool().num_threads();
  if (tiles.size() < enough && most_spans > 1) return attend_by_spans(cache.type, tiles, most_spans);
  pool().run(static_cast<uint32_t>(tiles.size()), [&](uint32_t part) {
    attend_all(cache.type, tiles.at(part));
  });
}

void find_turns(const Rope& rope, const std::vector<int64_t>& positions, float* cos, float* sin) {
  const int half = rope.head_dim / 2;
  for (const int64_t position : positions) {
    for (int i = 0; i < half; ++i) {
      const float angle = static_cast<float>(position) * rope.frequencies[i];
      cos[i] = cos[half + i] = std::cos(angle) * rope.scaling;
      sin[half + i] = std::sin(angle) * rope.scaling;
      sin[i] = -sin[half + i];
    }
    cos += rope.head_dim;
    sin += rope.head_dim;
  }
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
