"""INT8 networks by Triton kernels of our own, on NVIDIA GPUs."""
