// Block plans of the CUDA kernels for Python: csrc/common/{device,fused}_scores_plan.h, nothing of its own.

#include "../common/fused_scores_plan.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;

void bind_device_plan(py::module_& module) {
  py::class_<itm::ScoresLaunch>(module, "ScoresLaunch")
      .def_readonly("tiles", &itm::ScoresLaunch::tiles)
      .def_readonly("row_capacity", &itm::ScoresLaunch::row_capacity)
      .def_readonly("splits", &itm::ScoresLaunch::splits)
      .def_readonly("group_blocks", &itm::ScoresLaunch::group_blocks)
      .def_readonly("shared_bytes", &itm::ScoresLaunch::shared_bytes);
  py::class_<itm::DeviceScoresPlan>(module, "DeviceScoresPlan")
      .def_readonly("image_bounds", &itm::DeviceScoresPlan::image_bounds)
      .def_readonly("caption_bounds", &itm::DeviceScoresPlan::caption_bounds)
      .def_readonly("workspace_bytes", &itm::DeviceScoresPlan::workspace_bytes)
      .def_readonly("flops", &itm::DeviceScoresPlan::flops)
      .def_readonly("launches", &itm::DeviceScoresPlan::launches)
      .def_readonly("t2i", &itm::DeviceScoresPlan::t2i)
      .def_readonly("i2t", &itm::DeviceScoresPlan::i2t)
      .def_readonly("useful_fraction", &itm::DeviceScoresPlan::useful_fraction);
  module.def(
      "plan_device_scores",
      [](int64_t images, int64_t regions, std::vector<int64_t> word_offsets, int64_t width, int64_t element_bytes,
         bool t2i, bool i2t, bool backward, bool copies_regions, bool copies_words, bool softmax, int64_t shared_limit,
         int64_t multiprocessors, int64_t workspace_bytes) {
        return itm::plan_device_scores({images, regions, std::move(word_offsets), width, element_bytes, t2i, i2t,
                                        backward, copies_regions, copies_words, softmax, shared_limit, multiprocessors},
                                       workspace_bytes);
      },
      py::arg("images"), py::arg("regions"), py::arg("word_offsets"), py::arg("width"), py::kw_only(),
      py::arg("element_bytes"), py::arg("t2i"), py::arg("i2t"), py::arg("backward"), py::arg("copies_regions"),
      py::arg("copies_words"), py::arg("softmax"), py::arg("shared_limit"), py::arg("multiprocessors"),
      py::arg("workspace_bytes"));
  // One launch: the block loop asks again for every block, whose sizes differ at the end of a batch.
  module.def(
      "scores_launch",
      [](int64_t groups, int64_t most_keys, int64_t rows, int64_t most_queries, int64_t element_bytes, bool uniform,
         bool backward, bool softmax, int64_t shared_limit, int64_t multiprocessors) {
        return itm::scores_launch({groups, most_keys, rows, most_queries, element_bytes, uniform, backward, softmax,
                                   shared_limit, multiprocessors});
      },
      py::arg("groups"), py::arg("most_keys"), py::arg("rows"), py::arg("most_queries"), py::kw_only(),
      py::arg("element_bytes"), py::arg("uniform"), py::arg("backward"), py::arg("softmax"), py::arg("shared_limit"),
      py::arg("multiprocessors"));

  py::class_<itm::FusedScoresPlan>(module, "FusedScoresPlan")
      .def_readonly("image_bounds", &itm::FusedScoresPlan::image_bounds)
      .def_readonly("caption_bounds", &itm::FusedScoresPlan::caption_bounds)
      .def_readonly("workspace_bytes", &itm::FusedScoresPlan::workspace_bytes)
      .def_readonly("flops", &itm::FusedScoresPlan::flops)
      .def_readonly("launches", &itm::FusedScoresPlan::launches)
      .def_readonly("useful_fraction", &itm::FusedScoresPlan::useful_fraction);
  module.def(
      "plan_fused_scores",
      [](int64_t images, std::vector<int64_t> word_offsets, int64_t width, bool copies_regions, bool copies_words,
         int64_t workspace_bytes) {
        return itm::plan_fused_scores({images, std::move(word_offsets), width, copies_regions, copies_words},
                                      workspace_bytes);
      },
      py::arg("images"), py::arg("word_offsets"), py::arg("width"), py::kw_only(), py::arg("copies_regions"),
      py::arg("copies_words"), py::arg("workspace_bytes"));
  module.def(
      "fused_word_tiles",
      [](const std::vector<int64_t>& offsets) {
        return itm::fused_word_tiles(offsets, 0, static_cast<int64_t>(offsets.size()) - 1);
      },
      py::arg("offsets"));
  struct FusedSizes {};
  py::class_<FusedSizes>(module, "FusedSizes")
      .def_property_readonly_static("regions", [](const py::object&) { return itm::kFusedRegions; })
      .def_property_readonly_static("images", [](const py::object&) { return itm::kFusedImages; })
      .def_property_readonly_static("words", [](const py::object&) { return itm::kFusedWords; })
      .def_property_readonly_static("slice", [](const py::object&) { return itm::kFusedSlice; })
      .def_property_readonly_static("gram_elements", [](const py::object&) { return itm::kFusedGramElements; })
      .def_property_readonly_static("shared_bytes", [](const py::object&) { return itm::fused_bytes(true).total; });

  py::class_<itm::MaximaLaunch>(module, "MaximaLaunch")
      .def_readonly("row_capacity", &itm::MaximaLaunch::row_capacity)
      .def_readonly("splits", &itm::MaximaLaunch::splits)
      .def_readonly("shared_bytes", &itm::MaximaLaunch::shared_bytes);
  py::class_<itm::DeviceMaximaPlan>(module, "DeviceMaximaPlan")
      .def_readonly("image_bounds", &itm::DeviceMaximaPlan::image_bounds)
      .def_readonly("caption_bounds", &itm::DeviceMaximaPlan::caption_bounds)
      .def_readonly("workspace_bytes", &itm::DeviceMaximaPlan::workspace_bytes)
      .def_readonly("flops", &itm::DeviceMaximaPlan::flops)
      .def_readonly("launches", &itm::DeviceMaximaPlan::launches)
      .def_readonly("launch", &itm::DeviceMaximaPlan::launch);
  module.def(
      "plan_device_maxima",
      [](int64_t images, int64_t regions, std::vector<int64_t> word_offsets, int64_t width, int64_t element_bytes,
         bool t2i, bool backward, bool arg_max_kept, bool linear, bool copies_regions, bool copies_words,
         int64_t multiprocessors, int64_t workspace_bytes) {
        return itm::plan_device_maxima({images, regions, std::move(word_offsets), width, element_bytes, t2i, backward,
                                        arg_max_kept, linear, copies_regions, copies_words, multiprocessors},
                                       workspace_bytes);
      },
      py::arg("images"), py::arg("regions"), py::arg("word_offsets"), py::arg("width"), py::kw_only(),
      py::arg("element_bytes"), py::arg("t2i"), py::arg("backward"), py::arg("arg_max_kept"), py::arg("linear"),
      py::arg("copies_regions"), py::arg("copies_words"), py::arg("multiprocessors"), py::arg("workspace_bytes"));
  module.def("maxima_launch", &itm::maxima_launch, py::arg("groups"), py::arg("rows"), py::arg("most_queries"),
             py::arg("multiprocessors"));
}
