"""Parts of benchmarks/sbi.py."""
