"""One ``.so``: ``build`` writes it, ``load`` opens it, ``inspect`` describes it.

Loading and running need tvm and numpy alone.
"""
