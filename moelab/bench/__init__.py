"""Benchmarks: speed as a ratio to stock mlx-lm in the same process, with intervals."""
