#include "layer.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "pool.h"
#include "room.h"

namespace shoal {

namespace {

// So many rows of gate and up stay in the caches of a processor until they have been multiplied.
constexpr int64_t kMlpRows = 256;

Rows normed(const Norm& norm, const float* x, int64_t stride, int64_t num_rows) {
  return {Rows::Kind::kNormed, x, stride, num_rows, norm.weight, norm.eps, {}};
}

void multiply(const Linear& linear, const Rows& rows, float* y, const float* onto = nullptr,
              int64_t onto_stride = 0) {
  multiply(linear.matrix, rows, {y, linear.matrix.num_rows, linear.bias, onto, onto_stride});
}

void norm_heads(const Norm& norm, float* x, int64_t stride, int64_t num_tokens, int num_heads,
                int head_dim) {
  for (int64_t token = 0; token < num_tokens; ++token) {
    for (int head = 0; head < num_heads; ++head) {
      float* own = x + token * stride + head * head_dim;
      isa().rms_norm(own, norm.weight + head * head_dim, norm.eps, head_dim, own);
    }
  }
}

std::vector<Rotation> rotations_of(const std::vector<Rope>& ropes, const Step& step,
                                   Room<float>& room) {
  const int64_t num_tokens = step.num_tokens();
  int64_t num_floats = 0;
  for (const Rope& rope : ropes) num_floats += 2 * num_tokens * rope.head_dim;
  float* next = room.of(num_floats);
  std::vector<Rotation> rotations;
  for (const Rope& rope : ropes) {
    const int64_t size = num_tokens * rope.head_dim;
    find_turns(rope, step.positions, next, next + size);
    rotations.push_back({next, next + size});
    next += 2 * size;
  }
  return rotations;
}

void check_ascend(const std::vector<int64_t>& rows, int64_t num_rows) {
  int64_t before = -1;
  for (const int64_t row : rows) {
    if (row <= before || row >= num_rows) throw std::out_of_range("rows that the step does not have");
    before = row;
  }
}

// Rows of `from`, ascending, to the first ones of `to`, which may be the same memory.
void take(const std::vector<int64_t>& rows, const float* from, int64_t stride, int64_t width,
          float* to) {
  for (const int64_t row : rows) {
    std::memmove(to, from + row * stride, width * sizeof(float));
    to += width;
  }
}

float* room_for_part(int64_t num_floats) {
  thread_local Room<float> room;
  return room.of(num_floats);
}

// `half` of a layer, added to what it is added to.
template <class Half>
void add(const Hidden& hidden, int64_t width, Ranks* ranks, const Half& half) {
  if (ranks == nullptr) return half(hidden);
  const bool has_gaps = hidden.num_tokens > 1 && hidden.stride != width;
  if (has_gaps) throw std::invalid_argument("rows with gaps between them");
  const int64_t count = hidden.num_tokens * width;
  float* part = ranks->place(count);
  if (part == nullptr) part = room_for_part(count);
  half({hidden.x, hidden.stride, hidden.num_tokens, part, nullptr});
  ranks->add(part, count, hidden.onto, hidden.y);
}

void run_for(const std::vector<int64_t>& read, const Layers::Layer& layer, const Hidden& hidden,
             const Rotation& rotation, const Cache& cache, const Step& step, Ranks* ranks) {
  const float* qkv = layer.attention.store(hidden, rotation, cache, step);
  if (read.empty()) return;
  const int64_t width = layer.mlp.down.matrix.num_rows, num_rows = static_cast<int64_t>(read.size());
  const int64_t attended_width = layer.attention.output.matrix.num_columns;
  float* attended = layer.attention.attend(qkv, cache, step);
  take(read, attended, attended_width, attended_width, attended);
  take(read, hidden.x, hidden.stride, width, hidden.y);
  const Hidden from_y = {hidden.y, width, num_rows, hidden.y, hidden.y};
  add(from_y, width, ranks, [&](const Hidden& half) { layer.attention.project(attended, half); });
  add(from_y, width, ranks, [&](const Hidden& half) { layer.mlp.run(half); });
}

}  // namespace

void AttentionHalf::run(const Hidden& hidden, const Rotation& rotation, const Cache& cache,
                        const Step& step) const {
  project(attend(store(hidden, rotation, cache, step), cache, step), hidden);
}

float* AttentionHalf::store(const Hidden& hidden, const Rotation& rotation, const Cache& cache,
                            const Step& step) const {
  if (hidden.num_tokens != step.num_tokens()) throw std::invalid_argument("rows of another step");
  thread_local Room<float> room;
  const int64_t num_tokens = hidden.num_tokens, width = qkv.matrix.num_rows;
  float* all = room.of(num_tokens * width);
  multiply(qkv, normed(norm, hidden.x, hidden.stride, num_tokens), all);
  const int num_turned = num_heads + num_kv_heads;
  if (head_norm.weight != nullptr) {
    norm_heads(head_norm, all, width, num_tokens, num_turned, head_dim);
  }
  rotate(all, width, num_tokens, num_turned, head_dim, rotation.cos, rotation.sin);
  const float* k = all + int64_t{num_heads} * head_dim;
  const float* v = k + int64_t{num_kv_heads} * head_dim;
  shoal::store(cache, k, width, v, width, step.slots.data(), num_tokens);
  return all;
}

float* AttentionHalf::attend(const float* q, const Cache& cache, const Step& step) const {
  thread_local Room<float> room;
  const int64_t q_width = int64_t{num_heads} * head_dim, width = qkv.matrix.num_rows;
  float* out = room.of(step.num_tokens() * q_width);
  for (const Group& group : step.groups) {
    shoal::attend(cache,
                  {q + group.first_row * width, width, out + group.first_row * q_width,
                   group.num_sequences, group.num_queries, num_heads, group.slots.data(), group.width,
                   step.positions.data() + group.first_row, scale, window, softcap});
  }
  return out;
}

void AttentionHalf::project(const float* attended, const Hidden& hidden) const {
  multiply(output,
           {Rows::Kind::kPlain, attended, output.matrix.num_columns, hidden.num_tokens, nullptr, 0, {}},
           hidden.y, hidden.onto, hidden.stride);
}

void MlpHalf::run(const Hidden& hidden) const {
  thread_local Room<float> room;
  const int64_t width = gate_up.matrix.num_rows;
  float* gates = room.of(std::min(kMlpRows, hidden.num_tokens) * width);
  for (int64_t first = 0; first < hidden.num_tokens; first += kMlpRows) {
    const int64_t count = std::min(kMlpRows, hidden.num_tokens - first);
    multiply(gate_up, normed(norm, hidden.x + first * hidden.stride, hidden.stride, count), gates);
    const float* onto = hidden.onto == nullptr ? nullptr : hidden.onto + first * hidden.stride;
    multiply(down, {Rows::Kind::kGated, gates, width, count, nullptr, 0, activation},
             hidden.y + first * down.matrix.num_rows, onto, hidden.stride);
  }
}

void Layers::run(const float* x, int64_t stride, int64_t num_tokens, float* y,
                 const std::vector<const Cache*>& caches, const Step& step,
                 const std::vector<int64_t>* read, Ranks* ranks) const {
  if (caches.size() != layers.size()) throw std::invalid_argument("caches of other layers");
  if (read != nullptr) check_ascend(*read, num_tokens);
  thread_local Room<float> turns;
  const std::vector<Rotation> rotations = rotations_of(ropes, step, turns);
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const Rotation& rotation = rotations.at(layer.rope);
    const int64_t width = layer.mlp.down.matrix.num_rows;
    const Hidden from_y = {y, width, num_tokens, y, y};
    const Hidden from_x = {x, stride, num_tokens, y, x};
    const Hidden& hidden = i == 0 ? from_x : from_y;
    if (read != nullptr && i + 1 == layers.size()) {
      return run_for(*read, layer, hidden, rotation, *caches[i], step, ranks);
    }
    add(hidden, width, ranks,
        [&](const Hidden& half) { layer.attention.run(half, rotation, *caches[i], step); });
    add(from_y, width, ranks, [&](const Hidden& half) { layer.mlp.run(half); });
  }
}

}  // namespace shoal
