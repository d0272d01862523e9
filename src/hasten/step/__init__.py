"""One call of the transformer: which run and step it belongs to, and what stands before it."""
