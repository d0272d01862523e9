"""One optimisation a file. A pass changes instances only and returns how it is undone."""
