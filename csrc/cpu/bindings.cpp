// The Python module of the CPU kernels.
#include <common/bindings.h>
#include <cpu.h>
#include <parallel.h>

using namespace fastst;

PYBIND11_MODULE(FASTST_MODULE, m) {
  m.doc() = "CPU kernels of fastst: raw float32 pointers in, results in memory of the caller.";

  bind_common(m);

  py::enum_<cpu::Sums>(m, "Sums", kLocal)
      .value("best", cpu::Sums::best)
      .value("direct", cpu::Sums::direct)
      .value("winograd", cpu::Sums::winograd);
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
