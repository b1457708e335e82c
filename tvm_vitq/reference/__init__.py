"""Second, independent implementations: the float module by torch, the integer dialect by int64 NumPy."""
