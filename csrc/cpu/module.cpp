// SPDX-License-Identifier: Apache-2.0
// Makes the library importable. Importing it runs the static initialisers of
// the other files, which attach their kernels to the operators.
#include <Python.h>

#define COFIRE_JOIN_(a, b) a##b
#define COFIRE_JOIN(a, b) COFIRE_JOIN_(a, b)
#define COFIRE_TEXT_(a) #a
#define COFIRE_TEXT(a) COFIRE_TEXT_(a)

PyMODINIT_FUNC COFIRE_JOIN(PyInit_, TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, COFIRE_TEXT(TORCH_EXTENSION_NAME), nullptr,
                               -1, nullptr};
  return PyModule_Create(&module);
}
