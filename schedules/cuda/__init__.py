"""What is special on the integer units of NVIDIA GPUs: device functions, kernels, compilation."""
