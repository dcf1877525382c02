// Version of the interface between the compiled kernels and the Python modules that call them. Raise it, here
// and in nbs/system/native.ipynb, whenever a signature or a layout changes: an older library is then not called.
extern "C" __attribute__((visibility("default"))) int sl_abi_version() { return 8; }
