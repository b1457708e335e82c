"""IRModule to IRModule: the vitq dialect and the passes on Relax, one pass per file.

The folder keeps the name the project was asked for; TVM removed Relay, and Relax is its successor.
"""
