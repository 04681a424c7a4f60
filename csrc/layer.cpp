#include "layer.h"

#include <algorithm>
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

}  // namespace

void AttentionHalf::run(const Hidden& hidden, const Rotation& rotation, const Cache& cache,
                        const Step& step) const {
  if (hidden.num_tokens != step.num_tokens()) throw std::invalid_argument("rows of another step");
  thread_local Room<float> qkv_room, out_room;
  const int64_t q_width = int64_t{num_heads} * head_dim, kv_width = int64_t{num_kv_heads} * head_dim;
  const int64_t width = q_width + 2 * kv_width, num_tokens = hidden.num_tokens;
  float* q = qkv_room.of(num_tokens * width);
  float* out = out_room.of(num_tokens * q_width);
  multiply(qkv, normed(norm, hidden.x, hidden.stride, num_tokens), q);
  const int num_turned = num_heads + num_kv_heads;
  if (head_norm.weight != nullptr) {
    norm_heads(head_norm, q, width, num_tokens, num_turned, head_dim);
  }
  rotate(q, width, num_tokens, num_turned, head_dim, rotation.cos, rotation.sin);
  const float* k = q + q_width;
  store(cache, k, width, k + kv_width, width, step.slots.data(), num_tokens);
  for (const Group& group : step.groups) {
    attend(cache, {q + group.first_row * width, width, out + group.first_row * q_width,
                   group.num_sequences, group.num_queries, num_heads, group.slots.data(), group.width,
                   step.positions.data() + group.first_row, scale, window, softcap});
  }
  multiply(output, {Rows::Kind::kPlain, out, q_width, num_tokens, nullptr, 0, {}}, hidden.y,
           hidden.onto, hidden.stride);
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
                 const std::vector<const Cache*>& caches, const Step& step) const {
  if (caches.size() != layers.size()) throw std::invalid_argument("caches of other layers");
  thread_local Room<float> turns;
  const std::vector<Rotation> rotations = rotations_of(ropes, step, turns);
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const Hidden from_y = {y, layer.mlp.down.matrix.num_rows, num_tokens, y, y};
    const Hidden from_x = {x, stride, num_tokens, y, x};
    layer.attention.run(i == 0 ? from_x : from_y, rotations.at(layer.rope), *caches[i], step);
    layer.mlp.run(from_y);
  }
}

}  // namespace shoal
