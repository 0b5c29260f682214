// The Python module that a library is.
#include "methods.h"

PyMODINIT_FUNC PyInit_tucka_native() {
  static std::vector<PyMethodDef> methods = tucka::Methods::all();
  methods.push_back({nullptr, nullptr, 0, nullptr});
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "tucka_native", nullptr, -1, methods.data()};
  return PyModule_Create(&module);
}
