"""Particle filters along a diffusion's chain, and what they say of themselves."""
