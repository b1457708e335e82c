"""Second, independent implementations: float modules by torch, the integer dialect by NumPy."""
