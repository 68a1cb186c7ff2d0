"""Prompts for sweeps of tiny models, whose tokenizer has a token a byte."""

from __future__ import annotations

PROMPTS = [
    {"id": "a poem", "domain": "prose", "text": "The sea was grey, the gulls were loud."},
    {"id": "a loop", "domain": "python", "text": "for i in range(10):\n    print(i * i)"},
    {"id": "a list", "domain": "shell", "text": "ls -la /usr/share | sort | head -n 3"},
    {"id": "a sum", "domain": "python", "text": "total = sum(x for x in [1, 2, 3, 5, 8])"},
]
"""Four texts, in three domains."""
