"""Unlabelled images in, statistics out: data sources, observers, the ranges they propose."""
