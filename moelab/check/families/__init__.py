"""`moelab families`: every mlx-lm family with routed experts, tried on a tiny random checkpoint."""

from __future__ import annotations
