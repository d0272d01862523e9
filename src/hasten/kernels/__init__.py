"""One operation a file: plain torch, and where it pays the same as one Triton kernel."""
