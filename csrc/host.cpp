// SPDX-License-Identifier: Apache-2.0
// cofire._host: what the compiled part knows about itself and this machine, and can ask of it.
// It links nothing of torch, so that it loads, and can tell, when the rest does not fit.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "large_pages.h"

namespace py = pybind11;

namespace {

py::dict build() {
  py::dict facts;
  facts["torch"] = COFIRE_TORCH_VERSION;
  facts["compiler"] = COFIRE_COMPILER;
  facts["variants"] = py::str(COFIRE_VARIANTS).attr("split")(",");
#ifdef _OPENMP
  facts["openmp"] = true;
#else
  facts["openmp"] = false;
#endif
  return facts;
}

// Instruction sets beyond the variant, which single functions may use.
std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  __builtin_cpu_init();
#define COFIRE_FEATURE(name) \
  if (__builtin_cpu_supports(name)) found.push_back(name);
  COFIRE_FEATURE("avx2")
  COFIRE_FEATURE("fma")
  COFIRE_FEATURE("avx512f")
  COFIRE_FEATURE("avx512bw")
  COFIRE_FEATURE("avx512vl")
  COFIRE_FEATURE("avx512vnni")
  COFIRE_FEATURE("avx512bf16")
  COFIRE_FEATURE("avx512vbmi")
  COFIRE_FEATURE("avx512vpopcntdq")
#undef COFIRE_FEATURE
#endif
  return found;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.def("build", &build, "Compiler, torch version and CPU variants of this build.");
  m.def("cpu_features", &cpu_features, "Instruction sets of this CPU that kernels care about.");
  m.def(
      "ask_for_large_pages",
      [](uintptr_t data, size_t bytes) {
        cofire::ask_for_large_pages(reinterpret_cast<void*>(data), bytes);
      },
      "For memory that nothing was written to yet: pages of 2 MB, if the system has some.");
  m.def(
      "gather_in_large_pages",
      [](uintptr_t data, size_t bytes) {
        cofire::gather_in_large_pages(reinterpret_cast<void*>(data), bytes);
      },
      "For memory that was written and will be read again and again: the same.");
}
