"""Linears in eight bits: which ones (`plan`), what stands in for them (`linear`), and how far each
is from the original on real activations (`report`)."""
