"""Measurements on one GPU: sections of cells, run in a process that can be killed."""
