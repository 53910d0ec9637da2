// itm_kernels.native._host: what the host decides without touching a tensor (block plans, build information).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../common/capability.h"
#include "../common/max_similarity_plan.h"
#include "../common/scores_plan.h"
#include "../common/tile_choice.h"

namespace py = pybind11;

void bind_device_plan(py::module_& module);  // device_plan.cpp

namespace {

itm::ScoresPlan plan_scores(std::vector<int64_t> region_offsets, std::vector<int64_t> word_offsets, int64_t width,
                            int64_t element_bytes, bool t2i, bool i2t, bool backward, bool copies_regions,
                            int64_t threads, int64_t workspace_bytes) {
  return itm::plan_scores({std::move(region_offsets), std::move(word_offsets), width, element_bytes, t2i, i2t, backward,
                           copies_regions, threads},
                          workspace_bytes);
}

itm::ScoresPlan plan_max_similarity(std::vector<int64_t> region_offsets, std::vector<int64_t> word_offsets,
                                    int64_t width, int64_t element_bytes, bool t2i, bool backward, bool arg_max_kept,
                                    bool copies_regions, int64_t threads, int64_t workspace_bytes) {
  return itm::plan_max_similarity({std::move(region_offsets), std::move(word_offsets), width, element_bytes, t2i,
                                   backward, arg_max_kept, copies_regions, threads},
                                  workspace_bytes);
}

py::dict build_information() {
  py::dict information;
#if defined(__clang__)
  information["compiler"] = "clang " __clang_version__;
#else
  information["compiler"] = "gcc " __VERSION__;
#endif
  information["torch_target"] = ITM_TORCH_TARGET;
  information["no_cuda"] = ITM_NO_CUDA;  // why there are no CUDA kernels; empty: there are
  return information;
}

}  // namespace

PYBIND11_MODULE(_host, module) {
  py::class_<itm::ScoresPlan>(module, "ScoresPlan")
      .def_readonly("image_bounds", &itm::ScoresPlan::image_bounds)
      .def_readonly("caption_bounds", &itm::ScoresPlan::caption_bounds)
      .def_readonly("workspace_bytes", &itm::ScoresPlan::workspace_bytes)
      .def_readonly("flops", &itm::ScoresPlan::flops)
      .def_readonly("launches", &itm::ScoresPlan::launches);
  module.def("plan_scores", &plan_scores, py::arg("region_offsets"), py::arg("word_offsets"), py::arg("width"),
             py::kw_only(), py::arg("element_bytes"), py::arg("t2i"), py::arg("i2t"), py::arg("backward"),
             py::arg("copies_regions"), py::arg("threads"), py::arg("workspace_bytes"));
  module.def("plan_max_similarity", &plan_max_similarity, py::arg("region_offsets"), py::arg("word_offsets"),
             py::arg("width"), py::kw_only(), py::arg("element_bytes"), py::arg("t2i"), py::arg("backward"),
             py::arg("arg_max_kept"), py::arg("copies_regions"), py::arg("threads"), py::arg("workspace_bytes"));
  module.def("tile_width", [](int64_t keys) { return itm::tile_bounds(keys).width; }, py::arg("keys"));
  module.def("cpu_capability", [] { return std::string(itm::name_of(itm::cpu_capability())); });
  bind_device_plan(module);
  module.def("build_information", &build_information);
}
