"""The ops of a CPU in C++: kernels that are built at first use and kept, with the signatures of the plain bodies."""
