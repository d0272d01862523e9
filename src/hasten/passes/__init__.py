"""The passes, one optimisation per file. A pass changes instances only and returns its undo."""
