"""x86: dot-product instructions and the kernels made of them."""
