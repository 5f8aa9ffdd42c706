"""Tempered laws from a guide to a posterior: particles, moves, evidence and verdict."""
