"""Check an artefact on a GPU, time it beside PyTorch, print a table: ``python3 -m runner``.

This folder is copied into the bundle as it is. It needs numpy; the timings need PyTorch. Neither
tvm nor timm is imported: TVM's runtime is called through its C interface.
"""
