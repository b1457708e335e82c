"""AArch64: dot-product instructions, requantisation, and what its kernels do differently."""
