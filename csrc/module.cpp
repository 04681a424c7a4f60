// Python's view. Tensors come as addresses: their owner has seen to type, shape and lifetime.
#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "attention.h"
#include "layer.h"
#include "matrix.h"
#include "pool.h"
#include "ranks.h"
#include "sample.h"
#include "step.h"
#include "table.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace shoal;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

Matrix shape(int bits, int64_t n, int64_t k) { return {bits, nullptr, n, k}; }

void multiply_by(const Matrix& matrix, const Rows& rows, uintptr_t y, int64_t y_stride,
                 uintptr_t bias) {
  nb::gil_scoped_release release;
  multiply(matrix, rows, {at<float>(y), y_stride, at<const float>(bias)});
}

}  // namespace

NB_MODULE(shoal_kernels, m) {
  // A server that is told to stop does not take its model apart first.
  nb::set_leak_warnings(false);
  m.def("set_num_threads", [](int number) { pool().resize(number); });
  m.def("num_threads", [] { return pool().num_threads(); });
  m.def("isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i < num_isas(); ++i) names.push_back(isa_at(i).name);
    return names;
  }, "What this processor can run, the best last.");
  m.def("isa", [] { return std::string(isa().name); });
  m.def("choose_isa", [](const std::string& name) {
    if (!choose_isa(name.c_str())) throw nb::value_error("this processor has no such instructions");
  });
  m.def("num_bytes", [](int bits, int64_t n, int64_t k) {
    const Matrix matrix = shape(bits, n, k);
    return matrix.num_tiles() * matrix.tile_bytes();
  });
  m.def("pack4", [](uintptr_t codes, uintptr_t scales, uintptr_t minimums, int64_t n, int64_t k,
                    uintptr_t tiles) {
    nb::gil_scoped_release release;
    pack4(at<const uint8_t>(codes), at<const float>(scales), at<const float>(minimums),
          shape(4, n, k), at<uint8_t>(tiles));
  });
  m.def("pack8", [](uintptr_t weights, int64_t n, int64_t k, uintptr_t tiles) {
    nb::gil_scoped_release release;
    pack8(at<const float>(weights), shape(8, n, k), at<uint8_t>(tiles));
  });
  nb::class_<Matrix>(m, "Matrix")
      .def("__init__", [](Matrix* self, int bits, uintptr_t tiles, int64_t n, int64_t k) {
        new (self) Matrix{bits, at<const uint8_t>(tiles), n, k};
      })
      .def("multiply", [](const Matrix& matrix, uintptr_t x, int64_t stride, int64_t num_rows,
                          uintptr_t y, int64_t y_stride, uintptr_t bias) {
        multiply_by(matrix, {Rows::Kind::kPlain, at<const float>(x), stride, num_rows, nullptr, 0, {}},
                    y, y_stride, bias);
      })
      .def("multiply_normed", [](const Matrix& matrix, uintptr_t x, int64_t stride,
                                 int64_t num_rows, uintptr_t weight, float eps, uintptr_t y,
                                 int64_t y_stride, uintptr_t bias) {
        multiply_by(matrix, {Rows::Kind::kNormed, at<const float>(x), stride, num_rows,
                             at<const float>(weight), eps, {}}, y, y_stride, bias);
      })
      .def("multiply_gated", [](const Matrix& matrix, uintptr_t x, int64_t stride,
                                int64_t num_rows, int activation, uintptr_t y, int64_t y_stride,
                                uintptr_t bias) {
        multiply_by(matrix, {Rows::Kind::kGated, at<const float>(x), stride, num_rows, nullptr, 0,
                             static_cast<Activation>(activation)}, y, y_stride, bias);
      });
  nb::class_<Cache>(m, "Cache")
      .def("__init__", [](Cache* self, int type, uintptr_t keys, uintptr_t values,
                          int64_t num_slots, int num_kv_heads, int head_dim) {
        new (self) Cache{static_cast<CacheType>(type), at<uint8_t>(keys), at<uint8_t>(values),
                         num_slots, num_kv_heads, head_dim};
      })
      .def("store", [](const Cache& cache, uintptr_t k, int64_t k_stride, uintptr_t v,
                       int64_t v_stride, uintptr_t slots, int64_t num_tokens) {
        store(cache, at<const float>(k), k_stride, at<const float>(v), v_stride,
              at<const int64_t>(slots), num_tokens);
      })
      .def("attend", [](const Cache& cache, uintptr_t q, int64_t q_stride, uintptr_t out,
                        int64_t num_sequences, int64_t num_queries, int num_heads,
                        uintptr_t slots, int64_t width,
                        uintptr_t positions, float scale, int64_t window, float softcap) {
        nb::gil_scoped_release release;
        attend(cache, {at<const float>(q), q_stride, at<float>(out), num_sequences, num_queries,
                       num_heads,
                       at<const int64_t>(slots), width, at<const int64_t>(positions), scale,
                       window, softcap});
      });
  nb::class_<Step>(m, "Step")
      .def("__init__", [](Step* self, int64_t block_size) { new (self) Step{block_size, {}, {}, {}}; })
      .def("add", [](Step& step, std::vector<int64_t> starts, std::vector<int64_t> ahead,
                     std::vector<std::vector<int64_t>> blocks, int64_t num_queries) {
        step.add({std::move(starts), std::move(ahead), std::move(blocks), num_queries});
      });
  nb::class_<AttentionHalf>(m, "AttentionHalf")
      .def("__init__", [](AttentionHalf* self, uintptr_t norm, float eps, const Matrix& qkv,
                          uintptr_t qkv_bias, uintptr_t head_norm, float head_eps,
                          const Matrix& output, uintptr_t output_bias, int num_heads,
                          int num_kv_heads, int head_dim, float scale, int64_t window,
                          float softcap) {
        new (self) AttentionHalf{{at<const float>(norm), eps},
                                 {qkv, at<const float>(qkv_bias)},
                                 {at<const float>(head_norm), head_eps},
                                 {output, at<const float>(output_bias)},
                                 num_heads, num_kv_heads, head_dim, scale, window, softcap};
      })
      .def("run", [](const AttentionHalf& half, uintptr_t x, int64_t stride, int64_t num_tokens,
                     uintptr_t y, uintptr_t cos, uintptr_t sin, const Cache& cache,
                     const Step& step) {
        nb::gil_scoped_release release;
        half.run({at<const float>(x), stride, num_tokens, at<float>(y), nullptr},
                 {at<const float>(cos), at<const float>(sin)}, cache, step);
      });
  nb::class_<MlpHalf>(m, "MlpHalf")
      .def("__init__", [](MlpHalf* self, uintptr_t norm, float eps, const Matrix& gate_up,
                          uintptr_t gate_up_bias, int activation, const Matrix& down,
                          uintptr_t down_bias) {
        new (self) MlpHalf{{at<const float>(norm), eps},
                           {gate_up, at<const float>(gate_up_bias)},
                           static_cast<Activation>(activation),
                           {down, at<const float>(down_bias)}};
      })
      .def("run", [](const MlpHalf& half, uintptr_t x, int64_t stride, int64_t num_tokens,
                     uintptr_t y) {
        nb::gil_scoped_release release;
        half.run({at<const float>(x), stride, num_tokens, at<float>(y), nullptr});
      });
  nb::class_<Ranks>(m, "Ranks")
      .def("__init__", [](Ranks* self, uintptr_t flags, uintptr_t slots, int rank, int num_ranks,
                          int64_t slot_bytes, double poll_s, Ranks::Wait wait) {
        new (self) Ranks(at<uint8_t>(flags), at<uint8_t>(slots), rank, num_ranks, slot_bytes,
                         std::chrono::duration<double>(poll_s), std::move(wait));
      })
      .def("add", [](Ranks& ranks, uintptr_t part, int64_t count) {
        nb::gil_scoped_release release;
        ranks.add(at<float>(part), count, nullptr, at<float>(part));
      })
      .def_prop_ro("sent_bytes", &Ranks::sent_bytes);
  nb::class_<Layers>(m, "Layers")
      .def(nb::init<>())
      .def("add_rope", [](Layers& all, uintptr_t frequencies, int head_dim, float scaling) {
        all.ropes.push_back({at<const float>(frequencies), head_dim, scaling});
      })
      .def("add", [](Layers& all, const AttentionHalf& attention, const MlpHalf& mlp, size_t rope) {
        all.layers.push_back({attention, mlp, rope});
      })
      .def("run", [](const Layers& all, uintptr_t x, int64_t stride, int64_t num_tokens, uintptr_t y,
                     const std::vector<const Cache*>& caches, const Step& step,
                     const std::optional<std::vector<int64_t>>& read, Ranks* ranks) {
        nb::gil_scoped_release release;
        all.run(at<const float>(x), stride, num_tokens, at<float>(y), caches, step,
                read ? &*read : nullptr, ranks);
      }, "x"_a, "stride"_a, "num_tokens"_a, "y"_a, "caches"_a, "step"_a, "read"_a.none(),
         "ranks"_a.none());
  m.def("find_turns", [](uintptr_t frequencies, int head_dim, float scaling,
                         const std::vector<int64_t>& positions, uintptr_t cos, uintptr_t sin) {
    find_turns({at<const float>(frequencies), head_dim, scaling}, positions, at<float>(cos),
               at<float>(sin));
  });
  m.def("rotate", [](uintptr_t x, int64_t stride, int64_t num_tokens, int num_heads, int head_dim,
                     uintptr_t cos, uintptr_t sin) {
    rotate(at<float>(x), stride, num_tokens, num_heads, head_dim, at<const float>(cos),
           at<const float>(sin));
  });
  nb::class_<Draw>(m, "Draw")
      .def("__init__", [](Draw* self, int64_t row, uint64_t key, float temperature, int64_t top_k,
                          double top_p, double min_p) {
        new (self) Draw{row, key, temperature, top_k, top_p, min_p};
      });
  m.def("draw", [](uintptr_t logits, int64_t stride, int64_t width, const std::vector<Draw>& draws,
                   double likely) {
    nb::gil_scoped_release release;
    return draw({at<const float>(logits), stride, width}, draws, likely);
  });
  m.def("look_up", [](int type, uintptr_t rows, int64_t num_rows, int64_t width,
                      const std::vector<int64_t>& tokens, uintptr_t y) {
    look_up({static_cast<TableType>(type), at<const uint16_t>(rows), num_rows, width}, tokens,
            at<float>(y));
  });
  nb::class_<Wanted>(m, "Wanted").def(nb::init<int64_t, int64_t, int64_t>());
  nb::class_<Scores>(m, "Scores")
      .def_ro("target", &Scores::target)
      .def_ro("best_ids", &Scores::best_ids)
      .def_ro("best", &Scores::best);
  m.def("score", [](uintptr_t logits, int64_t stride, int64_t width,
                    const std::vector<Wanted>& wanted) {
    nb::gil_scoped_release release;
    return score({at<const float>(logits), stride, width}, wanted);
  });
}
