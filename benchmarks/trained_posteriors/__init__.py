"""Parts of ``benchmarks/trained_posterior.py``: the prior, the problems, the methods, the scores."""
