#include "sample.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <stdexcept>

#include "matrix.h"
#include "pool.h"

namespace shoal {

namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
constexpr int64_t kSortedAtOnce = 32;
// The best token always stays, whatever top_p says.
constexpr double kSomeMass = std::numeric_limits<double>::min();

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

struct Candidate {
  float logit;
  float weight;
  int32_t id;
};

bool is_better(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

// A row that is looked at, in memory that stays for the next one.
class Row {
 public:
  Row(const float* logits, int64_t width) : logits_(logits), width_(width) {
    grow(room_.peaks, num_peaks(width));
    peak_ = isa().find_peaks(logits, width, room_.peaks.data());
  }

  bool is_distribution() const { return std::isfinite(peak_); }
  int64_t width() const { return width_; }
  float peak() const { return peak_; }

  // Every token's weight, the best one's is 1; returns their sum.
  double weigh(float temperature) {
    grow(room_.weights, width_);
    return isa().weigh(logits_, width_, peak_, temperature, room_.weights.data());
  }
  float weight(int64_t id) const { return room_.weights[id]; }
  double weight_between(float least, float below) const {
    return isa().sum_between(room_.weights.data(), width_, least, below);
  }
  template <class Each>
  void each_of_weight(float least, const Each& each) {
    const int64_t number = find(room_.weights.data(), least);
    for (int64_t i = 0; i < number; ++i) each(room_.places[i]);
  }

  std::vector<Candidate>& candidates() { return room_.candidates; }

  // At least so many of the best become the candidates, and all that are as good as one of these.
  void choose_best(int64_t count) {
    const int64_t number = find(logits_, least_of_best(count));
    room_.candidates.resize(number);
    for (int64_t i = 0; i < number; ++i) {
      const int32_t id = room_.places[i];
      room_.candidates[i] = {logits_[id], 0.0f, id};
    }
  }
  // Those that weigh so much; all tokens have been weighed.
  void choose_of_weight(float least) {
    const int64_t number = find(room_.weights.data(), least);
    room_.candidates.resize(number);
    for (int64_t i = 0; i < number; ++i) {
      const int32_t id = room_.places[i];
      room_.candidates[i] = {logits_[id], room_.weights[id], id};
    }
  }
  void choose_exactly(int64_t count) {
    choose_best(count);
    std::vector<Candidate>& found = room_.candidates;
    if (count >= static_cast<int64_t>(found.size())) return;
    std::nth_element(found.begin(), found.begin() + count, found.end(), is_better);
    found.resize(count);
  }
  double weigh_candidates(float temperature) {
    std::vector<Candidate>& found = room_.candidates;
    const int64_t number = found.size();
    grow(room_.some, number);
    float* some = room_.some.data();
    for (int64_t i = 0; i < number; ++i) some[i] = found[i].logit;
    const double total = isa().weigh(some, number, peak_, temperature, some);
    for (int64_t i = 0; i < number; ++i) found[i].weight = some[i];
    return total;
  }

 private:
  struct Room {
    std::vector<float> peaks, weights, some;
    std::vector<int32_t> places;
    std::vector<Candidate> candidates;
  };

  template <class T>
  static void grow(std::vector<T>& memory, int64_t size) {
    if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  }
  int64_t find(const float* x, float least) {
    grow(room_.places, width_);
    return isa().find(x, width_, least, room_.places.data());
  }
  // Each peak is a token: so many tokens are at least as good as the last of so many peaks.
  float least_of_best(int64_t count) {
    const int64_t number = num_peaks(width_);
    if (count > number) return -std::numeric_limits<float>::infinity();
    float* peaks = room_.peaks.data();
    std::nth_element(peaks, peaks + count - 1, peaks + number, std::greater<float>());
    return peaks[count - 1];
  }

  static thread_local Room room_;
  const float* logits_;
  int64_t width_;
  float peak_;
};

thread_local Row::Room Row::room_;

int64_t draw_from_all(Row& row, const Draw& draw, double likely) {
  const double total = row.weigh(draw.temperature);
  const float is_likely = static_cast<float>(likely * total);
  const float least = static_cast<float>(draw.min_p);
  Race race(draw.key);
  row.each_of_weight(std::max(is_likely, least), [&](int64_t id) { race.enter(id, row.weight(id)); });
  if (least >= is_likely) return race.winner();
  race.enter(row.width(), row.weight_between(least, is_likely));
  if (race.winner() != row.width()) return race.winner();
  Race among_unlikely(draw.key);
  for (int64_t id = 0; id < row.width(); ++id) {
    const float weight = row.weight(id);
    if (weight >= least && weight < is_likely) among_unlikely.enter(id, weight);
  }
  return among_unlikely.winner();
}

// Weights of at most 1 by their 16th parts of an octave, the largest last.
constexpr int kBuckets = (127 << 4) + 1;

int bucket_of(const Candidate& candidate) {
  return static_cast<int>(std::bit_cast<uint32_t>(candidate.weight) >> 19);
}

using Candidates = std::vector<Candidate>::iterator;

// Where those end that reach `mass` together, the best first; reorders them.
Candidates cut(Candidates first, Candidates last, double mass) {
  while (last - first > kSortedAtOnce) {
    const Candidates middle = first + (last - first) / 2;
    std::nth_element(first, middle, last, is_better);
    double upper = 0.0;
    for (Candidates each = first; each < middle; ++each) upper += each->weight;
    if (upper >= mass) {
      last = middle;
    } else {
      mass -= upper;
      first = middle;
    }
  }
  std::sort(first, last, is_better);
  while (first < last && mass > 0.0) mass -= (first++)->weight;
  return first;
}

// The same for many: all but one bucket of them need no order.
Candidates nucleus(std::vector<Candidate>& candidates, double mass) {
  std::array<double, kBuckets> weights = {};
  for (const Candidate& each : candidates) weights[bucket_of(each)] += each.weight;
  int bucket = kBuckets - 1;
  for (; bucket > 0 && weights[bucket] < mass; --bucket) mass -= weights[bucket];
  const Candidates above = std::partition(candidates.begin(), candidates.end(),
                                          [&](auto& each) { return bucket_of(each) > bucket; });
  const Candidates within = std::partition(above, candidates.end(),
                                           [&](auto& each) { return bucket_of(each) == bucket; });
  return cut(above, within, mass);
}

// Chooses those that top-p is cut from; returns the weight that it is a part of.
double choose(Row& row, const Draw& draw) {
  if (draw.top_k > 0) {
    row.choose_exactly(std::min(draw.top_k, row.width()));
    return row.weigh_candidates(draw.temperature);
  }
  const double total = row.weigh(draw.temperature);
  // All tokens that weigh less than this are together less than what top-p leaves out.
  row.choose_of_weight(0.99 * (1.0 - draw.top_p) * total / row.width());
  return total;
}

int64_t draw_from_best(Row& row, const Draw& draw) {
  const double total = choose(row, draw);
  std::vector<Candidate>& candidates = row.candidates();
  const Candidates end =
      draw.top_p < 1.0 ? nucleus(candidates, std::max(draw.top_p * total, kSomeMass)) : candidates.end();
  Race race(draw.key);
  for (Candidates each = candidates.begin(); each < end; ++each) {
    if (each->weight >= draw.min_p) race.enter(each->id, each->weight);
  }
  return race.winner();
}

int64_t draw_one(const Logits& logits, const Draw& draw, double likely) {
  Row row(logits.row(draw.row), logits.width);
  if (!row.is_distribution()) return 0;
  const bool is_cut = draw.top_k > 0 || draw.top_p < 1.0;
  return is_cut ? draw_from_best(row, draw) : draw_from_all(row, draw, likely);
}

Scores score_one(const float* logits, int64_t width, const Wanted& wanted) {
  Row row(logits, width);
  Scores scores = {std::nanf(""), {}, {}};
  if (!row.is_distribution()) {
    for (int64_t id = 0; id < wanted.num_best; ++id) scores.best_ids.push_back(id);
    scores.best.resize(wanted.num_best, std::nanf(""));
    return scores;
  }
  const float log_total = static_cast<float>(std::log(row.weigh(1.0f)));
  scores.target = logits[wanted.target] - row.peak() - log_total;
  if (wanted.num_best == 0) return scores;
  row.choose_exactly(std::min(wanted.num_best, width));
  std::sort(row.candidates().begin(), row.candidates().end(), is_better);
  for (const Candidate& each : row.candidates()) {
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
    scores[i] = score_one(logits.row(i), logits.width, wanted[i]);
  });
  return scores;
}

}  // namespace shoal
