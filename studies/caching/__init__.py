"""Step caching side by side: hasten, fewer steps, better solvers, Diffusers' caches, cache-dit."""
