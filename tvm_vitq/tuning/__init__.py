"""Tuning on the target: which tasks a model has, which schedules they may have, which is fastest.

``extract`` finds the tasks, ``search`` proposes points of their spaces, ``build`` makes kernels of
points, runners (``runner``, ``board``) time them beside the default schedule's, and ``tune`` keeps
the records. Nothing is kept that gave one wrong output.
"""
