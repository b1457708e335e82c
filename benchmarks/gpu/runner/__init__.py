"""Check an artefact on a GPU, time it beside PyTorch, print a table: ``python3 -m runner``.

This folder is copied into the bundle as it is. It needs numpy; the timings need PyTorch. Neither
tvm nor timm is imported: TVM's runtime is called through its C interface.
"""

import importlib.util
import sys

if importlib.util.find_spec("numpy") is None:
    print("error: the runner needs numpy: pip install numpy", file=sys.stderr)
    sys.exit(2)
