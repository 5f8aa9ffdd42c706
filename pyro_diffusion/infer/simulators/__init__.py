"""Posteriors and conditionals learned from a program's own simulations."""
