// The ops as functions of a Python module, called by position. torch.ops takes 3 us for a call and gives the interpreter's
// lock away with each, some 70 in a step, each of which then waits for whatever another thread does with it.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <initializer_list>

#include "vectors.h"

namespace tucka {

// Rows of the first argument from which on a call gives the lock away: it takes milliseconds.
constexpr int64_t kLong = 64;

template <class T>
struct Argument;

template <>
struct Argument<Tensor> {
  static const Tensor& of(PyObject* object) {
    TORCH_CHECK_TYPE(THPVariable_Check(object), "a native kernel wants a tensor here, not ", Py_TYPE(object)->tp_name);
    return THPVariable_Unpack(object);
  }
};

template <>
struct Argument<std::optional<Tensor>> {
  static std::optional<Tensor> of(PyObject* object) {
    if (object == Py_None) return std::nullopt;
    return Argument<Tensor>::of(object);
  }
};

template <>
struct Argument<int64_t> {
  static int64_t of(PyObject* object) {
    const int64_t value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw python_error();
    return value;
  }
};

template <>
struct Argument<double> {
  static double of(PyObject* object) {
    const double value = PyFloat_AsDouble(object);
    if (value == -1 && PyErr_Occurred()) throw python_error();
    return value;
  }
};

inline PyObject* wrap(Tensor&& tensor) { return THPVariable_Wrap(std::move(tensor)); }

inline PyObject* wrap(std::tuple<Tensor, Tensor>&& pair) {
  PyObject* both = PyTuple_New(2);
  if (both == nullptr) throw python_error();
  PyTuple_SET_ITEM(both, 0, wrap(std::move(std::get<0>(pair))));
  PyTuple_SET_ITEM(both, 1, wrap(std::move(std::get<1>(pair))));
  if (PyErr_Occurred()) throw python_error();
  return both;
}

template <auto op, class... A, size_t... I>
inline PyObject* call_with(PyObject* const* given, std::index_sequence<I...>) {
  const std::tuple<decltype(Argument<std::decay_t<A>>::of(nullptr))...> arguments{
      Argument<std::decay_t<A>>::of(given[I])...};
  const Tensor& first = std::get<0>(arguments);
  std::optional<pybind11::gil_scoped_release> released;
  if (first.dim() && first.size(0) > kLong) released.emplace();
  if constexpr (std::is_void_v<std::invoke_result_t<decltype(op), A...>>) {
    op(std::get<I>(arguments)...);
    released.reset();
    Py_RETURN_NONE;
  } else {
    auto result = op(std::get<I>(arguments)...);
    released.reset();
    return wrap(std::move(result));
  }
}

template <auto op, class R, class... A>
inline PyObject* checked(R (*)(A...), PyObject* const* given, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == sizeof...(A), "a native kernel wants ", sizeof...(A), " arguments, not ", count);
  return call_with<op, A...>(given, std::index_sequence_for<A...>());
  END_HANDLE_TH_ERRORS
}

template <auto op>
PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return checked<op>(op, given, count);
}

// Functions of the module; all are made before the module is.
struct Methods {
  static std::vector<PyMethodDef>& all() {
    static std::vector<PyMethodDef> methods;
    return methods;
  }
  Methods(std::initializer_list<std::pair<const char*, _PyCFunctionFast>> own) {
    for (const auto& [name, function] : own)
      all().push_back({name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr});
  }
};

}  // namespace tucka
