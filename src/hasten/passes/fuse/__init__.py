"""Fusion: what a run needs once is made once, and the blocks run on fused kernels."""
