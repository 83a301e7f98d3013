// PyTorch's tensors as arguments. They are asked by their own methods, so that nothing here needs
// torch, and in C++, since as much Python would take longer than a small convolution.
#pragma once

#include <common/bindings.h>
#include <cpu.h>

#include <optional>
#include <vector>

namespace fastst::cpu {

// A dense float32 array that is only read; others are copied to one for the time of the call.
struct Vector : Array {};

// A dense float32 array of the caller's own, which is written to.
struct Written : Array {};

// The memory of a tensor, whatever it is.
struct Memory {
  void* data = nullptr;
};

// The names of what tensors are asked for, and the dtypes that kernels store.
struct Torch {
  PyObject *shape, *stride, *data_ptr, *read_address, *dtype, *is_contiguous, *dtypes[3], *float64;

  static const Torch& get() {
    static const Torch torch = [] {
      const auto name = [](const char* s) { return PyUnicode_InternFromString(s); };
      const py::module_ module = py::module_::import("torch");
      const py::module_ memory = py::module_::import("fastst.problem.memory");
      const auto type = [&](const char* s) { return py::object(module.attr(s)).release().ptr(); };
      return Torch{name("shape"),
                   name("stride"),
                   name("data_ptr"),
                   py::object(memory.attr("read_address")).release().ptr(),
                   name("dtype"),
                   name("is_contiguous"),
                   {type("float32"), type("bfloat16"), type("float16")},
                   type("float64")};
    }();
    return torch;
  }
  std::optional<Storage> storage(py::handle type) const {
    for (int i = 0; i < 3; ++i)
      if (type.ptr() == dtypes[i]) return static_cast<Storage>(i);
    return {};
  }
};

// The results of attributes and of methods without arguments.
class Asked {
 public:
  explicit Asked(py::handle tensor) : tensor_(tensor) {}

  py::object attribute(PyObject* name) const { return own(PyObject_GetAttr(tensor_.ptr(), name)); }
  py::object method(PyObject* name) const {
    return own(PyObject_CallMethodNoArgs(tensor_.ptr(), name));
  }
  // To be read. What is written to is made by the caller, and has no copy-on-write clones.
  void* data() const {
    PyObject* const read_address = Torch::get().read_address;
    return PyLong_AsVoidPtr(own(PyObject_CallOneArg(read_address, tensor_.ptr())).ptr());
  }
  // To be written, of a tensor that may have such clones: it gets memory of its own first.
  void* own_data() const { return PyLong_AsVoidPtr(method(Torch::get().data_ptr).ptr()); }
  // Fills what has room for them; how many there are.
  int64_t numbers(const py::object& tuple, int64_t* to, int64_t room) const {
    const int64_t n = PyTuple_Size(tuple.ptr());
    for (int64_t i = 0; i < std::min(n, room); ++i)
      to[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
    return n;
  }
  std::optional<Storage> storage() const {
    return Torch::get().storage(attribute(Torch::get().dtype));
  }

 private:
  static py::object own(PyObject* result) {
    if (!result) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }
  py::handle tensor_;
};

}  // namespace fastst::cpu

namespace pybind11::detail {

using fastst::Array;
using fastst::cpu::Asked;
using fastst::cpu::Memory;
using fastst::cpu::PairTensors;
using fastst::cpu::ParallelTensors;
using fastst::cpu::Storage;
using fastst::cpu::Torch;
using fastst::cpu::Vector;
using fastst::cpu::View;
using fastst::cpu::Written;

// A torch.dtype.
template <>
struct type_caster<Storage> {
  PYBIND11_TYPE_CASTER(Storage, const_name("dtype"));

  bool load(handle dtype, bool) {
    const auto found = Torch::get().storage(dtype);
    value = found.value_or(value);
    return found.has_value();
  }
};

// A 5-D tensor in one of the dtypes that kernels store.
template <>
struct type_caster<View> {
  PYBIND11_TYPE_CASTER(View, const_name("Tensor"));

  bool load(handle tensor, bool) {
    const Torch& torch = Torch::get();
    if (!PyObject_HasAttr(tensor.ptr(), torch.data_ptr)) return false;
    const Asked ask(tensor);
    const auto storage = ask.storage();
    if (!storage) return false;
    value.storage = *storage;
    if (ask.numbers(ask.attribute(torch.shape), value.size.data(), 5) != 5) return false;
    ask.numbers(ask.method(torch.stride), value.stride.data(), 5);
    value.data = ask.data();
    return true;
  }
};

// A dense float32 tensor, or None for none.
template <>
struct type_caster<Array> {
  PYBIND11_TYPE_CASTER(Array, const_name("Tensor | None"));

  bool load(handle tensor, bool) {
    if (tensor.is_none()) return true;
    const Torch& torch = Torch::get();
    if (!PyObject_HasAttr(tensor.ptr(), torch.data_ptr)) return false;
    const Asked ask(tensor);
    if (ask.storage() != Storage::f32 || ask.method(torch.is_contiguous).ptr() != Py_True)
      return false;
    std::array<int64_t, 2> size = {1, 1};
    if (ask.numbers(ask.attribute(torch.shape), size.data(), 2) > 2) return false;
    value = {ask.data(), size[0] * size[1]};
    return true;
  }
};

template <>
struct type_caster<Written> {
  PYBIND11_TYPE_CASTER(Written, const_name("Tensor | None"));

  bool load(handle tensor, bool convert) {
    make_caster<Array> array;
    if (!array.load(tensor, convert)) return false;
    static_cast<Array&>(value) = array;
    if (!tensor.is_none()) value.data = Asked(tensor).own_data();
    return true;
  }
};

// A 1-D tensor of any floating dtype, or None.
template <>
struct type_caster<Vector> {
  PYBIND11_TYPE_CASTER(Vector, const_name("Tensor | None"));

  bool load(handle tensor, bool) {
    if (tensor.is_none()) return true;
    const Torch& torch = Torch::get();
    if (!PyObject_HasAttr(tensor.ptr(), torch.data_ptr)) return false;
    const Asked ask(tensor);
    const auto storage = ask.storage();
    const bool wide = !storage && ask.attribute(torch.dtype).ptr() == torch.float64;
    int64_t count = 0, stride = 1;
    if ((!storage && !wide) || ask.numbers(ask.attribute(torch.shape), &count, 1) != 1)
      return false;
    ask.numbers(ask.method(torch.stride), &stride, 1);
    value.data = ask.data(), value.count = count;
    if (storage == Storage::f32 && stride == 1) return true;
    copy_.resize(count);
    const auto copy = [&](const auto* from, auto read) {
      for (int64_t i = 0; i < count; ++i) copy_[i] = read(from + i * stride);
    };
    if (wide)
      copy(static_cast<const double*>(value.data),
           [](const double* p) { return static_cast<float>(*p); });
    else
      fastst::cpu::with_storage(*storage, [&](auto s) {
        copy(static_cast<const decltype(s)*>(value.data),
             [](const auto* p) { return fastst::cpu::load(p, 1)[0]; });
      });
    value.data = copy_.data();
    return true;
  }

 private:
  std::vector<float> copy_;
};

template <>
struct type_caster<Memory> {
  PYBIND11_TYPE_CASTER(Memory, const_name("Tensor"));

  bool load(handle tensor, bool) {
    if (!PyObject_HasAttr(tensor.ptr(), Torch::get().data_ptr)) return false;
    value.data = Asked(tensor).data();
    return true;
  }
};

// The entries of a NamedTuple of three tensors and V vectors, and what vectors are copied to.
template <int V>
class Entries {
 public:
  bool load(handle tuple, View* const (&views)[3], Array* const (&arrays)[V]) {
    if (!PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) < 3 + V) return false;
    for (int i = 0; i < 3; ++i) {
      make_caster<View> view;
      if (!view.load(PyTuple_GET_ITEM(tuple.ptr(), i), false)) return false;
      *views[i] = view;
    }
    for (int i = 0; i < V; ++i) {
      if (!vectors_[i].load(PyTuple_GET_ITEM(tuple.ptr(), 3 + i), false)) return false;
      *arrays[i] = static_cast<Vector&>(vectors_[i]);
    }
    return true;
  }

 private:
  make_caster<Vector> vectors_[V];
};

template <>
struct type_caster<PairTensors> {
  PYBIND11_TYPE_CASTER(PairTensors, const_name("PairTensors"));

  bool load(handle tuple, bool convert) {
    make_caster<std::optional<View>> residual;
    make_caster<Array> table;
    if (!entries_.load(
            tuple, {&value.x, &value.weight[0], &value.weight[1]},
            {&value.bias[0], &value.bias[1], &value.gamma, &value.beta, &value.mean, &value.var}) ||
        PyTuple_GET_SIZE(tuple.ptr()) != 11 ||
        !residual.load(PyTuple_GET_ITEM(tuple.ptr(), 9), convert) ||
        !table.load(PyTuple_GET_ITEM(tuple.ptr(), 10), convert))
      return false;
    value.residual = static_cast<std::optional<View>&>(residual);
    value.outer_table = static_cast<Array&>(table);
    return true;
  }

 private:
  Entries<6> entries_;
};

template <>
struct type_caster<ParallelTensors> {
  PYBIND11_TYPE_CASTER(ParallelTensors, const_name("ParallelTensors"));

  bool load(handle tuple, bool) {
    return entries_.load(tuple, {&value.x, &value.weight[0], &value.weight[1]},
                         {&value.bias[0], &value.bias[1]});
  }

 private:
  Entries<2> entries_;
};

}  // namespace pybind11::detail
