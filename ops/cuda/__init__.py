"""The ops of an NVIDIA GPU where the plain bodies cannot stand in a CUDA graph."""
