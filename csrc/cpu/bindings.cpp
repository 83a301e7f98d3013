// The Python module. Tensors come as addresses, sizes and strides, so that it needs no torch.
#include <cpu.h>
#include <parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace fastst;

namespace {

// Each build of this module, and the CUDA one, has types of its own.
const py::module_local kLocal;

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// Nothing here touches Python objects while it computes.
template <class R, class... P>
auto unlocked(R (*f)(P...)) {
  return [f](P... arguments) {
    py::gil_scoped_release released;
    return f(arguments...);
  };
}

}  // namespace

PYBIND11_MODULE(FASTST_MODULE, m) {
  m.doc() = "CPU kernels of fastst: raw float32 pointers in, results in memory of the caller.";

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
      .value("norm_gradient", Write::norm_gradient);

  py::enum_<cpu::Sums>(m, "Sums", kLocal)
      .value("best", cpu::Sums::best)
      .value("direct", cpu::Sums::direct)
      .value("winograd", cpu::Sums::winograd);

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
  py::class_<cpu::Epilogue>(m, "Epilogue", kLocal)
      .def(py::init<Write, Array, Array, Activation, Activation, double, std::optional<View>,
                    Array>(),
           py::arg("write"), py::arg("bias"), py::arg("coefficients"), py::arg("act"),
           py::arg("outer"), py::arg("slope"), py::arg("aux"), py::arg("reductions"));

  py::class_<cpu::PairPass>(m, "PairPass", kLocal).def(py::init<View, Array, Conv>());
  py::class_<cpu::Pair>(m, "Pair", kLocal)
      .def(py::init<View, cpu::PairPass, cpu::PairPass, Array, Array, Array, Array, double,
                    Activation, Activation, double, std::array<int64_t, 5>, int64_t, int64_t,
                    std::optional<View>, View>(),
           py::arg("x"), py::arg("first"), py::arg("second"), py::arg("mean"), py::arg("var"),
           py::arg("gamma"), py::arg("beta"), py::arg("eps"), py::arg("act"), py::arg("outer"),
           py::arg("slope"), py::arg("mid_shape"), py::arg("strip"), py::arg("large"),
           py::arg("residual"), py::arg("out"));

  m.def("use_openmp", &cpu::use_openmp, py::arg("gomp_parallel"),
        "Take the threads of an OpenMP runtime; 0: start threads for every call.");
  m.def("tap_conv", unlocked(cpu::tap_conv));
  m.def("input_gradient", unlocked(cpu::input_gradient));
  m.def("weight_gradient", unlocked(cpu::weight_gradient));
  m.def("pair", unlocked(cpu::pair));
  m.def("norm_coefficients", unlocked(cpu::norm_coefficients));
  m.def("batch_norm_backward", unlocked(cpu::batch_norm_backward));
  m.def("multiply_panels", unlocked(cpu::multiply_panels), py::arg("rounds"), py::arg("threads"));
}
