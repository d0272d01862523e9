"""Comparison of step caching: hasten, fewer steps, other solvers, Diffusers' caches, cache-dit."""
