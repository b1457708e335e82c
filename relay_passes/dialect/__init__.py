"""The ``vitq.*`` operators: type inference, definition, bounds, builders; one file per family."""
