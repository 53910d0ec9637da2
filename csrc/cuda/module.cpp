// The module that carries the CUDA kernels. TORCH_EXTENSION_NAME is its name, _C_cuda or _C_cuda_90a.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#define ITM_PASTE(a, b) a##b
#define ITM_INIT(name) ITM_PASTE(PyInit_, name)
#define ITM_QUOTE(name) #name
#define ITM_NAME(name) ITM_QUOTE(name)

// Importing it loads the library, whose static initialisers register the kernels; its one member says for which GPUs.
extern "C" PyMODINIT_FUNC ITM_INIT(TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, ITM_NAME(TORCH_EXTENSION_NAME), nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
  if (module != nullptr && PyModule_AddStringConstant(module, "architectures", ITM_ARCHITECTURES) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
