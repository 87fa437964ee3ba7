// SPDX-License-Identifier: Apache-2.0
// cofire._call: calls operators from Python with less work on the way than torch.ops, which reads
// the schema anew at each call. It goes to the dispatcher all the same, and past autograd where
// nothing is recorded; whatever it does not know it leaves to torch.ops.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace {

enum class Kind { kTensor, kInt, kInts, kFloat, kBool, kString };

struct Parameter {
  Kind kind;
  bool optional;
};

struct Caller {
  c10::OperatorHandle op;
  std::vector<Parameter> parameters;
  size_t results;
  bool in_tuple;
};

std::optional<Kind> kind_of(const c10::Type& type) {
  switch (type.kind()) {
    case c10::TypeKind::TensorType:
      return Kind::kTensor;
    case c10::TypeKind::IntType:
      return Kind::kInt;
    case c10::TypeKind::FloatType:
      return Kind::kFloat;
    case c10::TypeKind::BoolType:
      return Kind::kBool;
    case c10::TypeKind::StringType:
      return Kind::kString;
    case c10::TypeKind::ListType:
      if (type.expectRef<c10::ListType>().getElementType()->kind() != c10::TypeKind::IntType) {
        return {};
      }
      return Kind::kInts;
    default:
      return {};
  }
}

// Nothing where an argument or a result is of a type that is not known here.
std::unique_ptr<Caller> caller_of(const c10::OperatorHandle& op) {
  auto made = std::make_unique<Caller>(Caller{op, {}, op.schema().returns().size(), false});
  made->in_tuple = made->results > 1;
  for (const c10::Argument& argument : op.schema().arguments()) {
    const c10::TypePtr& type = argument.type();
    const bool optional = type->kind() == c10::TypeKind::OptionalType;
    const auto kind =
        kind_of(optional ? *type->expectRef<c10::OptionalType>().getElementType() : *type);
    if (!kind.has_value()) return nullptr;
    made->parameters.push_back({*kind, optional});
  }
  for (const c10::Argument& result : op.schema().returns()) {
    if (result.type()->kind() != c10::TypeKind::TensorType) return nullptr;
  }
  return made;
}

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

// An argument, or nothing: subclasses of tensors, which may have a say of their own, and whatever
// would have to be converted.
class Reader {
 public:
  bool read(PyObject* from, Parameter parameter, torch::jit::Stack& stack) {
    if (from == Py_None && parameter.optional) {
      stack.emplace_back();
      return true;
    }
    switch (parameter.kind) {
      case Kind::kTensor:
        return THPVariable_CheckExact(from) && (stack.emplace_back(seen(from)), true);
      case Kind::kInt: {
        int64_t number = 0;
        return is_int(from, number) && (stack.emplace_back(number), true);
      }
      case Kind::kFloat:
        if (PyFloat_CheckExact(from)) {
          stack.emplace_back(PyFloat_AS_DOUBLE(from));
          return true;
        }
        if (int64_t number = 0; is_int(from, number)) {
          stack.emplace_back(static_cast<double>(number));
          return true;
        }
        return false;
      case Kind::kBool:
        return PyBool_Check(from) && (stack.emplace_back(from == Py_True), true);
      case Kind::kString: {
        Py_ssize_t size = 0;
        const char* text =
            PyUnicode_CheckExact(from) ? PyUnicode_AsUTF8AndSize(from, &size) : nullptr;
        return text != nullptr && (stack.emplace_back(std::string(text, size)), true);
      }
      case Kind::kInts: {
        c10::List<int64_t> list;
        if (!PyList_CheckExact(from) && !PyTuple_CheckExact(from)) return false;
        for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(from); ++i) {
          int64_t number = 0;
          if (!is_int(PySequence_Fast_GET_ITEM(from, i), number)) return false;
          list.push_back(number);
        }
        stack.emplace_back(std::move(list));
        return true;
      }
    }
    return false;
  }
  bool requires_grad() const { return requires_grad_; }

 private:
  static bool is_int(PyObject* from, int64_t& to) {
    if (!PyLong_CheckExact(from)) return false;
    int overflow = 0;
    to = PyLong_AsLongLongAndOverflow(from, &overflow);
    return overflow == 0;
  }

  const at::Tensor& seen(PyObject* from) {
    const at::Tensor& tensor = THPVariable_Unpack(from);
    requires_grad_ = requires_grad_ || tensor.requires_grad();
    return tensor;
  }

  bool requires_grad_ = false;
};

PyObject* result_of(const Caller& caller, torch::jit::Stack& stack) {
  if (caller.results == 0) Py_RETURN_NONE;
  if (!caller.in_tuple) return THPVariable_Wrap(std::move(stack[0]).toTensor());
  PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(caller.results));
  if (tuple == nullptr) throw python_error();
  for (size_t i = 0; i < caller.results; ++i) {
    PyTuple_SET_ITEM(tuple, i, THPVariable_Wrap(std::move(stack[i]).toTensor()));
  }
  return tuple;
}

constexpr const char* kCapsule = "cofire._call.caller";

PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  const auto& caller = *static_cast<Caller*>(PyCapsule_GetPointer(self, kCapsule));
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  if (static_cast<size_t>(count) != caller.parameters.size() ||
      at::impl::torch_function_mode_enabled() ||
      keys.included_.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode)) {
    Py_RETURN_NOTIMPLEMENTED;
  }
  torch::jit::Stack stack;
  stack.reserve(std::max(caller.parameters.size(), caller.results));
  Reader reader;
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (!reader.read(args[i], caller.parameters[i], stack)) {
      PyErr_Clear();
      Py_RETURN_NOTIMPLEMENTED;
    }
  }
  {
    const WithoutGil others_run;
    std::optional<at::AutoDispatchBelowAutograd> past_autograd;
    if (!(reader.requires_grad() && c10::GradMode::is_enabled())) past_autograd.emplace();
    caller.op.callBoxed(stack);
  }
  return result_of(caller, stack);
  END_HANDLE_TH_ERRORS
}

PyMethodDef call_method = {
    "call", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call)), METH_FASTCALL,
    "The operator's result, or NotImplemented: then torch.ops has to be asked."};

PyObject* caller(PyObject* /*module*/, PyObject* name) {
  HANDLE_TH_ERRORS
  const char* text = PyUnicode_AsUTF8(name);
  if (text == nullptr) throw python_error();
  const auto op = c10::Dispatcher::singleton().findSchema({text, ""});
  TORCH_CHECK_VALUE(op.has_value(), "there is no operator ", text);
  std::unique_ptr<Caller> made = caller_of(*op);
  if (made == nullptr) Py_RETURN_NONE;
  PyObject* capsule = PyCapsule_New(made.get(), kCapsule, [](PyObject* held) {
    delete static_cast<Caller*>(PyCapsule_GetPointer(held, kCapsule));
  });
  if (capsule == nullptr) throw python_error();
  made.release();
  PyObject* function = PyCFunction_New(&call_method, capsule);
  Py_DECREF(capsule);
  return function;
  END_HANDLE_TH_ERRORS
}

PyMethodDef methods[] = {
    {"caller", caller, METH_O,
     "A function that calls an operator, or None, where types in its schema are not known here."},
    {nullptr, nullptr, 0, nullptr}};

PyModuleDef module_of = {PyModuleDef_HEAD_INIT,
                         "cofire._call",
                         "Calls of operators.",
                         -1,
                         methods,
                         nullptr,
                         nullptr,
                         nullptr,
                         nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__call() { return PyModule_Create(&module_of); }
