"""x86: dot-product instructions."""
