"""Triton kernels, one file per family; `registry` imports a family when one of its rows is first used.

Each family has `lower(packed, device)`, its op under torch.ops.sparse_backend with a fake, a naive reference, and a
budget of instructions per weight that tools/gpu_offline.py holds compiled code against.
"""
