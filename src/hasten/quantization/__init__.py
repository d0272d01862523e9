"""Eight-bit linears: which ones are quantised (`plan`), their classes (`linear`), and the error of
each on real activations (`report`)."""
