"""Rows of the reliability table: a module each, with `measure(full, seed, folder) -> Figure`; `run.py` runs them."""
