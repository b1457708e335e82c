"""``python -m tvm_vitq.cli`` is ``tvm-vitq``."""

from __future__ import annotations

from . import main

if __name__ == "__main__":
    main()
