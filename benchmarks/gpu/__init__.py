"""Integer kernels on a GPU beside PyTorch's: a bundle that travels, its runner, tables and bars."""
