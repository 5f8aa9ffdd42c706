"""Parts of ``benchmarks/densities.py``: modules with a ``main(scale)`` that prints a table and judges it."""
