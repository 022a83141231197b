"""The kernels for x86-64 CPUs, in C++ (csrc/cpu)."""
