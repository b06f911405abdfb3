"""Kernels: `registry` is the capability table, `cpu` loads the C++ library, `triton` holds those of GPUs."""
