"""Step caching: skip the transformer on some steps and combine its past outputs instead."""
