"""A simulated NPU: torch-npu and TorchAir as shipped, on a machine that has neither an NPU nor CANN.

`build.load` comes before torch-npu is imported; then `graphs` can be. Memory is the host's, kernels compute nothing.
"""
