#include "sample.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <span>
#include <stdexcept>

#include "pool.h"
#include "row.h"

namespace shoal {

namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr int64_t kSortedAtOnce = 32;

// splitmix64, as in Shoal's compute/race.py: what is drawn must not depend on who draws it.
uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

class Race {
 public:
  explicit Race(uint64_t key) : key_(key) {}

  void enter(int64_t id, double speed) {
    const uint64_t bits = mix(static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u + key_);
    const double uniform = (static_cast<double>(bits >> 11) + 0.5) * 0x1p-53;
    // The exponential is more than this: most need no logarithm to be too late.
    if (speed == 0.0 || uniform >= first_ * speed) return;
    const double arrival = -std::log1p(-uniform) / speed;
    if (arrival < first_) {
      first_ = arrival;
      winner_ = id;
    }
  }
  int64_t winner() const { return winner_; }

 private:
  uint64_t key_;
  double first_ = kNever;
  int64_t winner_ = 0;
};

int64_t draw_from_all(Row& row, const Draw& draw, double likely) {
  const double total = row.weigh(draw.temperature);
  const float is_likely = static_cast<float>(likely * total);
  const float least = static_cast<float>(draw.min_p);
  Race race(draw.key);
  for (const int32_t id : row.of_weight(std::max(is_likely, least))) {
    race.enter(id, row.weight(id));
  }
  if (least >= is_likely) return race.winner();
  race.enter(row.width(), row.sum_of_weights(least, is_likely));
  if (race.winner() != row.width()) return race.winner();
  Race among_unlikely(draw.key);
  for (int64_t id = 0; id < row.width(); ++id) {
    const float weight = row.weight(id);
    if (weight >= least && weight < is_likely) among_unlikely.enter(id, weight);
  }
  return among_unlikely.winner();
}

// The best that reach `mass` together, and one at least; reorders all.
std::span<const Candidate> nucleus(std::span<Candidate> candidates, double mass) {
  const auto begin = candidates.begin();
  auto first = begin, last = candidates.end();
  while (last - first > kSortedAtOnce) {
    const auto middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, is_better);
    double upper = 0.0;
    for (auto each = first; each < middle; ++each) upper += each->weight;
    if (upper >= mass) {
      last = middle;
    } else {
      mass -= upper;
      first = middle;
    }
  }
  std::sort(first, last, is_better);
  do {
    mass -= (first++)->weight;
  } while (first < last && mass > 0.0);
  return {begin, first};
}

void enter(std::span<const Candidate> candidates, double min_p, Race& race) {
  for (const Candidate& each : candidates) {
    if (each.weight >= min_p) race.enter(each.id, each.weight);
  }
}

int64_t draw_from_top_k(Row& row, const Draw& draw) {
  const std::span<Candidate> best = row.best(std::min(draw.top_k, row.width()));
  const double total = row.weigh(best, draw.temperature);
  Race race(draw.key);
  enter(draw.top_p < 1.0 ? nucleus(best, draw.top_p * total) : best, draw.min_p, race);
  return race.winner();
}

// Of weights up to 1, in 16ths of octaves, the largest last.
struct Buckets {
  static constexpr int kNumber = (127 << 4) + 1;
  std::array<double, kNumber> weights = {};

  static int of(float weight) { return static_cast<int>(std::bit_cast<uint32_t>(weight) >> 19); }
};

// All buckets above one belong to a nucleus and none below it: only this one needs an order.
int64_t draw_from_nucleus(Row& row, const Draw& draw) {
  const double total = row.weigh(draw.temperature);
  // All tokens that weigh less than this are together less than what top-p leaves out.
  const double least = 0.99 * (1.0 - draw.top_p) * total / static_cast<double>(row.width());
  const std::span<const int32_t> ids = row.of_weight(static_cast<float>(least));
  Buckets buckets;
  for (const int32_t id : ids) buckets.weights[Buckets::of(row.weight(id))] += row.weight(id);
  double mass = draw.top_p * total;
  int last = Buckets::kNumber - 1;
  for (; last > 0 && buckets.weights[last] < mass; --last) mass -= buckets.weights[last];
  Race race(draw.key);
  std::vector<Candidate> in_last;
  for (const int32_t id : ids) {
    const float weight = row.weight(id);
    const int bucket = Buckets::of(weight);
    if (bucket == last) in_last.push_back(row.candidate(id));
    if (bucket > last && weight >= draw.min_p) race.enter(id, weight);
  }
  if (!in_last.empty()) enter(nucleus(in_last, mass), draw.min_p, race);
  return race.winner();
}

int64_t draw_one(const Logits& logits, const Draw& draw, double likely) {
  Row row(logits.row(draw.row), logits.width);
  if (draw.temperature == 0.0f) return row.first_best();
  if (!row.is_distribution()) return 0;
  if (draw.top_k > 0) return draw_from_top_k(row, draw);
  if (draw.top_p < 1.0) return draw_from_nucleus(row, draw);
  return draw_from_all(row, draw, likely);
}

Scores score_one(const float* logits, int64_t width, const Wanted& wanted) {
  Row row(logits, width);
  const int64_t num_best = std::min(wanted.num_best, width);
  Scores scores = {std::nanf(""), {}, {}};
  if (!row.is_distribution()) {
    for (int64_t id = 0; id < num_best; ++id) scores.best_ids.push_back(id);
    scores.best.resize(num_best, std::nanf(""));
    return scores;
  }
  const float log_total = static_cast<float>(std::log(row.weigh(1.0f)));
  scores.target = logits[wanted.target] - row.peak() - log_total;
  if (num_best == 0) return scores;
  const std::span<Candidate> best = row.best(num_best);
  std::sort(best.begin(), best.end(), is_better);
  for (const Candidate& each : best) {
    scores.best_ids.push_back(each.id);
    scores.best.push_back(each.logit - row.peak() - log_total);
  }
  return scores;
}

}  // namespace

std::vector<int64_t> draw(const Logits& logits, const std::vector<Draw>& draws, double likely) {
  std::vector<int64_t> tokens(draws.size());
  pool().run(static_cast<uint32_t>(draws.size()),
             [&](uint32_t i) { tokens[i] = draw_one(logits, draws[i], likely); });
  return tokens;
}

std::vector<Scores> score(const Logits& logits, const std::vector<Wanted>& wanted) {
  for (const Wanted& each : wanted) {
    const bool fits = each.target >= 0 && each.target < logits.width && each.num_best >= 0;
    if (!fits) throw std::out_of_range("a token that the vocabulary does not have");
  }
  std::vector<Scores> scores(wanted.size());
  pool().run(static_cast<uint32_t>(wanted.size()), [&](uint32_t i) {
    scores[i] = score_one(logits.row(wanted[i].row), logits.width, wanted[i]);
  });
  return scores;
}

}  // namespace shoal
