// The Python module of the CPU kernels.
#include <parallel.h>
#include <tensors.h>

using namespace fastst;

namespace {

using cpu::Memory;
using cpu::PairPlan;
using cpu::PairTensors;
using cpu::ParallelPlan;
using cpu::ParallelTensors;
using cpu::Vector;
using cpu::Written;
using OptionalView = std::optional<cpu::View>;

// The gradient of x, from make_dx, or None. dy is the one entry of a list, which is emptied when it
// is read no more, so that its memory can serve.
py::object pair_backward(const PairPlan& plan, const PairTensors& tensors, const py::list& dy_owner,
                         Memory u, bool again, Memory dv, const Vector& mean, const Vector& var,
                         const Array& means, const OptionalView& first_weight,
                         const OptionalView& second_weight, const Array& bias, const Array& gamma,
                         const Array& beta, const py::object& make_dx, int threads) {
  const auto dy = py::cast<cpu::View>(dy_owner[0]);
  py::object dx = py::none();
  std::function<cpu::View()> make;
  if (!make_dx.is_none())
    make = [&] {
      const py::gil_scoped_acquire held;
      dx = make_dx();
      return py::cast<cpu::View>(dx);
    };
  const auto dy_read = [&] {
    const py::gil_scoped_acquire held;
    dy_owner.attr("clear")();
  };
  const py::gil_scoped_release released;
  cpu::pair_backward(plan, tensors, dy, {u.data, again, dv.data, {mean, var}, means},
                     {{first_weight, second_weight}, bias, gamma, beta}, dy_read, make, threads);
  return dx;
}

void bind_pairs(py::module_& m) {
  py::enum_<cpu::PairNorm>(m, "PairNorm", kLocal)
      .value("none", cpu::PairNorm::none)
      .value("batch", cpu::PairNorm::batch)
      .value("frozen", cpu::PairNorm::frozen);
  py::class_<PairPlan>(m, "PairPlan", kLocal)
      .def(py::init<std::array<Conv, 2>, Activation, Activation, double, double, cpu::PairNorm,
                    std::array<int64_t, 5>, int64_t, int64_t, cpu::Sums>(),
           py::arg("conv"), py::arg("act"), py::arg("outer"), py::arg("slope"), py::arg("eps"),
           py::arg("norm"), py::arg("mid_shape"), py::arg("strip"), py::arg("large"),
           py::arg("sums"));
  m.def("pair", unlocked(cpu::pair));
  m.def("pair_first", unlocked(+[](const PairPlan& p, const PairTensors& t, Memory u,
                                   const Array& mean, const Array& var, int threads) {
          cpu::pair_first(p, t, u.data, {mean, var}, threads);
        }));
  m.def("pair_second", unlocked(+[](const PairPlan& p, const PairTensors& t, Memory u,
                                    const Vector& mean, const Vector& var, const cpu::View& out,
                                    const Array& out_mean, const Array& out_var, int threads) {
          cpu::pair_second(p, t, u.data, {mean, var}, out, {out_mean, out_var}, threads);
        }));
  m.def("pair_training",
        unlocked(+[](const PairPlan& p, const PairTensors& t, Memory mid, bool kept,
                     const Array& mean, const Array& var, const cpu::View& out,
                     const Array& out_mean, const Array& out_var, int threads) {
          cpu::pair_training(p, t, mid.data, kept, {mean, var}, out, {out_mean, out_var}, threads);
        }));
  m.def("pair_backward", &pair_backward);
}

void bind_parallel(py::module_& m) {
  py::class_<ParallelPlan>(m, "ParallelPlan", kLocal)
      .def(py::init<std::array<Conv, 2>, Activation, Activation, double, bool, cpu::Sums>(),
           py::arg("conv"), py::arg("branch"), py::arg("act"), py::arg("slope"), py::arg("add"),
           py::arg("sums"));
  m.def("parallel", unlocked(cpu::parallel));
  m.def("parallel_backward", unlocked(+[](const ParallelPlan& p, const ParallelTensors& t,
                                          const cpu::View& first_dy, const cpu::View& second_dy,
                                          const OptionalView& dx, const OptionalView& first_weight,
                                          const OptionalView& second_weight, int threads) {
          cpu::parallel_backward(p, t, {first_dy, second_dy}, dx, {first_weight, second_weight},
                                 threads);
        }));
}

// One convolution: what is read, multiplied and written.
void bind_passes(py::module_& m) {
  py::enum_<cpu::Sums>(m, "Sums", kLocal)
      .value("best", cpu::Sums::best)
      .value("unrounded", cpu::Sums::unrounded)
      .value("direct", cpu::Sums::direct)
      .value("winograd", cpu::Sums::winograd)
      .value("pairs", cpu::Sums::pairs)
      .value("winograd_pairs", cpu::Sums::winograd_pairs)
      .value("amx", cpu::Sums::amx);
  // What these are made of must outlive them.
  py::class_<cpu::Source>(m, "Source", kLocal)
      .def(
          py::init<cpu::View, OptionalView, Array, Read, Activation, double, Array, OptionalView>(),
          py::arg("a"), py::arg("b"), py::arg("coefficients"), py::arg("read"), py::arg("act"),
          py::arg("slope"), py::arg("positions") = py::none(), py::arg("past") = py::none());
  py::class_<cpu::Epilogue>(m, "Epilogue", kLocal)
      .def(py::init<Write, Array, Array, Activation, Activation, double, OptionalView, Array>(),
           py::arg("write"), py::arg("bias"), py::arg("coefficients"), py::arg("act"),
           py::arg("outer"), py::arg("slope"), py::arg("aux"), py::arg("reductions"));
  m.def("tap_conv", unlocked(cpu::tap_conv));
  m.def("input_gradient", unlocked(cpu::input_gradient));
  m.def("weight_gradient", unlocked(cpu::weight_gradient));
}

}  // namespace

PYBIND11_MODULE(FASTST_MODULE, m) {
  m.doc() = "CPU kernels of fastst: tensors in, results in memory of the caller.";

  m.attr("INTERFACE") = 10;  // raised by each change of what is bound, with library.py
  bind_common(m);
  bind_passes(m);
  bind_pairs(m);
  bind_parallel(m);
  m.def("use_openmp", &cpu::use_openmp, py::arg("gomp_parallel"),
        "Take the threads of an OpenMP runtime; 0: start threads for every call.");
  m.def("kept_bytes", &cpu::kept_bytes);
  m.def("release_kept", &cpu::release_kept);
  m.def("batch_norm_backward",
        unlocked(+[](const cpu::View& dv, const cpu::View& y, const Vector& mean, const Vector& var,
                     const Vector& gamma, double eps, const OptionalView& dy, const Array& sums,
                     int threads) {
          cpu::batch_norm_backward(dv, y, mean, var, gamma, eps, dy, sums, threads);
        }));
  m.def(
      "update_running", +[](const Written& running_mean, const Written& running_var,
                            const Array& mean, const Array& var, double unbiased, double momentum) {
        cpu::update_running(running_mean, running_var, mean, var, unbiased, momentum);
      });
  m.def("channel_moments", unlocked(cpu::channel_moments));
  m.def("position_moments", unlocked(cpu::position_moments));
  m.def("outdoes", &cpu::outdoes, py::arg("dtype"));
  m.def("multiplies_pairs", &cpu::multiplies_pairs);
  m.def("multiplies_by_amx", &cpu::multiplies_by_amx);
  m.def("refuses_amx", &cpu::refuses_amx);
  m.def("multiply_panels", unlocked(cpu::multiply_panels), py::arg("rounds"), py::arg("threads"));
}
