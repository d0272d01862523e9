"""Step caching: skip the transformer on planned steps and let its past outputs stand in."""
