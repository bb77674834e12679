"""Triton kernels. Imported only through ``toolkit/engine/fused.py``, and only where there is a GPU."""
