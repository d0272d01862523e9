"""One operation per file: a reference in plain torch and, where it is faster, a Triton kernel."""
