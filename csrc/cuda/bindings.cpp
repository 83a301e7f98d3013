// The Python module. Tensors come as addresses, sizes and strides, so that it needs no torch.
#include <cuda_runtime.h>
#include <driver.h>
#include <kernels.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

namespace py = pybind11;
using namespace fastst;

namespace {

// More than one build of this module may be loaded, each with types of its own.
const py::module_local kLocal;

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Launches neither hold the interpreter's lock nor touch Python objects.
template <class... P>
auto launcher(void (*f)(Dtype, P...)) {
  return [f](Dtype dtype, P... arguments) {
    py::gil_scoped_release unlocked;
    f(dtype, arguments...);
  };
}

}  // namespace

PYBIND11_MODULE(FASTST_MODULE, m) {
  m.doc() = "CUDA kernels of fastst: raw pointers in, nothing allocated, nothing synchronised.";
  m.attr("EMULATED") = FASTST_EMULATED;
  m.attr("TOOLKIT") = CUDART_VERSION;

  py::enum_<Dtype>(m, "Dtype", kLocal)
      .value("f16", Dtype::f16)
      .value("bf16", Dtype::bf16)
      .value("f32", Dtype::f32)
      .value("f64", Dtype::f64);
  py::enum_<Activation>(m, "Activation", kLocal)
      .value("none", Activation::none)
      .value("relu", Activation::relu)
      .value("silu", Activation::silu)
      .value("gelu", Activation::gelu)
      .value("gelu_tanh", Activation::gelu_tanh)
      .value("leaky_relu", Activation::leaky_relu)
      .value("hardswish", Activation::hardswish);
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

  py::class_<View>(m, "View", kLocal)
      .def(py::init([](uintptr_t data, std::array<int64_t, 5> size, std::array<int64_t, 5> stride) {
        return View{pointer(data), size, stride};
      }));
  py::class_<Array>(m, "Array", kLocal)
      .def(py::init<>())
      .def(py::init([](uintptr_t data, int64_t count) { return Array{pointer(data), count}; }));
  py::class_<Conv>(m, "Conv", kLocal)
      .def(py::init<std::array<int64_t, 3>, std::array<int64_t, 3>, std::array<int64_t, 3>,
                    std::array<int64_t, 6>, int64_t, PadMode>(),
           py::arg("kernel"), py::arg("stride"), py::arg("dilation"), py::arg("padding"),
           py::arg("groups"), py::arg("mode"));
  py::class_<Source>(m, "Source", kLocal)
      .def(py::init<View, std::optional<View>, Array, Read, Activation, double>());
  py::class_<Branch>(m, "Branch", kLocal).def(py::init<Source, View, Array, Conv, Activation>());
  py::class_<TapConv>(m, "TapConv", kLocal)
      .def(py::init<std::vector<Branch>, std::vector<View>, std::optional<View>, Array, Write,
                    Activation, double, bool>());
  py::class_<Depthwise>(m, "Depthwise", kLocal)
      .def(py::init<View, View, View, Array, Array, Array, std::array<int64_t, 3>,
                    std::array<int64_t, 6>, Activation, double, int64_t, int64_t>());
  py::class_<HopperOutput>(m, "HopperOutput", kLocal)
      .def(py::init<View, std::optional<View>, Array, Array, Array, int64_t, Activation, double>());
  py::class_<HopperTile>(m, "HopperTile", kLocal)
      .def(py::init<int64_t, int64_t, int64_t, std::array<int64_t, 3>, int64_t, int64_t, int64_t,
                    int64_t>());
  py::class_<HopperSpatial>(m, "HopperSpatial", kLocal)
      .def(py::init<View, Array, Conv, HopperOutput, HopperTile>());
  py::class_<HopperGradientTile>(m, "HopperGradientTile", kLocal)
      .def(py::init<int64_t, int64_t, std::array<int64_t, 3>, int64_t, int64_t, int64_t>());
  py::class_<HopperSpatialGradient>(m, "HopperSpatialGradient", kLocal)
      .def(py::init<View, std::optional<View>, Array, Array, Conv, View, HopperGradientTile>());
  py::class_<HopperTemporal>(m, "HopperTemporal", kLocal)
      .def(py::init<View, Array, Conv, Array, Activation, double, HopperOutput, HopperTile>());
  py::class_<HopperTemporalGradient>(m, "HopperTemporalGradient", kLocal)
      .def(py::init<View, Array, Conv, View, std::optional<View>, Array, Array, int64_t, Activation,
                    double, HopperTile>());
  py::class_<HopperStem>(m, "HopperStem", kLocal)
      .def(py::init<View, Array, Array, std::array<int64_t, 6>, Array, Activation, double,
                    HopperOutput, int64_t, int64_t>());
  py::class_<HopperWeightTile>(m, "HopperWeightTile", kLocal)
      .def(py::init<int64_t, int64_t, int64_t, std::array<int64_t, 3>, int64_t, int64_t>());
  py::class_<HopperWeightGradient>(m, "HopperWeightGradient", kLocal)
      .def(py::init<View, std::optional<View>, View, Conv, bool, bool, Array, Activation, double,
                    Array, Array, int64_t, HopperWeightTile>());

  m.def("tap_conv", launcher(tap_conv));
  m.def("weight_gradient", launcher(weight_gradient));
  m.def("channel_statistics", launcher(channel_statistics));
  m.def("channel_sums", launcher(channel_sums));
  m.def("sum_rows", launcher(sum_rows));
  m.def("combine_statistics", launcher(combine_statistics));
  m.def("norm_coefficients", launcher(norm_coefficients));
  m.def("norm_gradient_coefficients", launcher(norm_gradient_coefficients));

  m.def("depthwise_forward", launcher(depthwise_forward));
  m.def("depthwise_backward", launcher(depthwise_backward));
  m.def("depthwise_blocks", &depthwise_blocks);
  m.def("depthwise_shared_bytes", &depthwise_shared_bytes);

  m.def("hopper_spatial", launcher(hopper_spatial));
  m.def("hopper_spatial_gradient", launcher(hopper_spatial_gradient));
  m.def("hopper_temporal", launcher(hopper_temporal));
  m.def("hopper_temporal_gradient", launcher(hopper_temporal_gradient));
  m.def("hopper_stem", launcher(hopper_stem));
  m.def("hopper_weight_gradient", launcher(hopper_weight_gradient));

  m.def("device_count", &device_count, "CUDA devices; 0 where there is none or no driver.");
  m.def("device_error", &device_error, "Why device_count is 0, or an empty string.");
  m.def("shared_memory_limit", &shared_memory_limit, py::arg("device"),
        "Bytes of shared memory that one block may have.");
  m.def("driver_entry_point", &driver_entry_point, py::arg("name"), py::arg("version"),
        "Address of a driver function as of a CUDA version; 0 where the driver lacks it.");
}
