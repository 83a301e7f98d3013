// What both Python modules take, beside tensors. Neither needs torch.
#pragma once

#include <common/api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace fastst {

namespace py = pybind11;

// Several modules, and several builds of one, may be loaded, each with types of its own.
const py::module_local kLocal;

// f without the interpreter's lock: nothing here touches Python objects while it computes.
template <class R, class... P>
auto unlocked(R (*f)(P...)) {
  return [f](P... arguments) {
    py::gil_scoped_release released;
    return f(arguments...);
  };
}

inline void bind_common(py::module_& m) {
#define FASTST_VALUE(name) .value(#name, Activation::name)
  py::enum_<Activation>(m, "Activation", kLocal) FASTST_ACTIVATIONS(FASTST_VALUE);
#undef FASTST_VALUE
  py::enum_<PadMode>(m, "PadMode", kLocal)
      .value("zeros", PadMode::zeros)
      .value("replicate", PadMode::replicate)
      .value("reflect", PadMode::reflect)
      .value("circular", PadMode::circular);
  py::enum_<Read>(m, "Read", kLocal)
      .value("plain", Read::plain)
      .value("norm_act", Read::norm_act)
      .value("norm_gradient", Read::norm_gradient);
  py::enum_<Write>(m, "Write", kLocal)
      .value("forward", Write::forward)
      .value("branch_gradient", Write::branch_gradient)
      .value("norm_gradient", Write::norm_gradient);

  py::class_<Conv>(m, "Conv", kLocal)
      .def(py::init([](std::array<int64_t, 3> kernel, std::array<int64_t, 3> stride,
                       std::array<int64_t, 3> dilation, std::array<int64_t, 6> padding,
                       int64_t groups, PadMode mode, std::optional<PadMode> frame_mode) {
             return Conv{
                 kernel, stride, dilation, padding, groups, mode, frame_mode.value_or(mode)};
           }),
           py::arg("kernel"), py::arg("stride"), py::arg("dilation"), py::arg("padding"),
           py::arg("groups"), py::arg("mode"), py::arg("frame_mode") = py::none());
}

}  // namespace fastst
