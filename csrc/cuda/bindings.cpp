// The Python module of the CUDA kernels.
#include <common/bindings.h>
#include <cuda_runtime.h>
#include <driver.h>
#include <kernels.h>

using namespace fastst;

PYBIND11_MODULE(FASTST_MODULE, m) {
  m.doc() = "CUDA kernels of fastst: raw pointers in, nothing allocated, nothing synchronised.";
  m.attr("EMULATED") = FASTST_EMULATED;
  m.attr("TOOLKIT") = CUDART_VERSION;

  py::enum_<Dtype>(m, "Dtype", kLocal)
      .value("f16", Dtype::f16)
      .value("bf16", Dtype::bf16)
      .value("f32", Dtype::f32)
      .value("f64", Dtype::f64);

  bind_common(m);
  const auto pointer = [](uintptr_t address) { return reinterpret_cast<void*>(address); };
  py::class_<View>(m, "View", kLocal)
      .def(
          py::init([=](uintptr_t data, std::array<int64_t, 5> size, std::array<int64_t, 5> stride) {
            return View{pointer(data), size, stride};
          }));
  py::class_<Array>(m, "Array", kLocal)
      .def(py::init<>())
      .def(py::init([=](uintptr_t data, int64_t count) { return Array{pointer(data), count}; }));
  py::class_<Source>(m, "Source", kLocal)
      .def(py::init<View, std::optional<View>, Array, Read, Activation, double, Array,
                    std::optional<View>>());

  py::class_<Branch>(m, "Branch", kLocal).def(py::init<Source, View, Array, Conv, Activation>());
  py::class_<TapConv>(m, "TapConv", kLocal)
      .def(py::init<std::vector<Branch>, std::vector<View>, std::optional<Source>, Write,
                    Activation, double, bool, std::array<int64_t, 2>>());
  py::class_<Depthwise>(m, "Depthwise", kLocal)
      .def(py::init<View, View, View, Array, Array, Array, std::array<int64_t, 3>,
                    std::array<int64_t, 6>, Activation, double, int64_t, int64_t>());
  py::class_<HopperOutput>(m, "HopperOutput", kLocal)
      .def(py::init<View, std::optional<View>, Array, Array, int64_t, Activation, double>());
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

  py::enum_<Row>(m, "Row", kLocal)
      .value("zero", Row::zero)
      .value("one", Row::one)
      .value("mean", Row::mean)
      .value("scale", Row::scale)
      .value("beta", Row::beta)
      .value("shift", Row::shift)
      .value("biased", Row::biased)
      .value("p", Row::p)
      .value("q", Row::q)
      .value("r", Row::r);
  py::enum_<Order>(m, "Order", kLocal)
      .value("forward", Order::forward)
      .value("mirrored", Order::mirrored)
      .value("stem", Order::stem);
  py::class_<PerChannel>(m, "PerChannel", kLocal)
      .def(py::init<>())
      .def(py::init([](uintptr_t data, Dtype dtype) {
        return PerChannel{reinterpret_cast<void*>(data), dtype};
      }));
  py::class_<Norm>(m, "Norm", kLocal)
      .def(py::init<PerChannel, PerChannel, PerChannel, PerChannel, PerChannel, double, int64_t>());
  py::class_<Table>(m, "Table", kLocal).def(py::init<Norm, Array, std::vector<Row>>());
  py::class_<Packing>(m, "Packing", kLocal).def(py::init<View, Array, int64_t, Order>());
  py::class_<RowSum>(m, "RowSum", kLocal).def(py::init<Array, Array, int64_t>());

  m.def("tap_conv", unlocked(tap_conv));
  m.def("weight_gradient", unlocked(weight_gradient));
  m.def("channel_statistics", unlocked(channel_statistics));
  m.def("channel_sums", unlocked(channel_sums));
  m.def("position_moments", unlocked(position_moments));
  m.def("position_sums", unlocked(position_sums));
  m.def("write_source", unlocked(write_source));
  m.def("sum_rows", unlocked(sum_rows));
  m.def("combine_statistics", unlocked(combine_statistics));
  m.def("norm_gradient", unlocked(norm_gradient));
  m.def("pack", unlocked(pack));

  m.def("depthwise_forward", unlocked(depthwise_forward));
  m.def("depthwise_backward", unlocked(depthwise_backward));
  m.def("depthwise_blocks", &depthwise_blocks);
  m.def("depthwise_shared_bytes", &depthwise_shared_bytes);

  m.def("hopper_spatial", unlocked(hopper_spatial));
  m.def("hopper_spatial_gradient", unlocked(hopper_spatial_gradient));
  m.def("hopper_temporal", unlocked(hopper_temporal));
  m.def("hopper_temporal_gradient", unlocked(hopper_temporal_gradient));
  m.def("hopper_stem", unlocked(hopper_stem));
  m.def("hopper_weight_gradient", unlocked(hopper_weight_gradient));

  m.def("device_count", &device_count, "CUDA devices; 0 where there is none or no driver.");
  m.def("device_error", &device_error, "Why device_count is 0, or an empty string.");
  m.def("shared_memory_limit", &shared_memory_limit, py::arg("device"),
        "Bytes of shared memory that one block may have.");
  m.def("driver_entry_point", &driver_entry_point, py::arg("name"), py::arg("version"),
        "Address of a driver function as of a CUDA version; 0 where the driver lacks it.");
}
