"""Replacement policies: who leaves when an expert needs a slot."""

from __future__ import annotations

from .base import Policy, PolicyBase, placed
from .counts import LCP, LFRU, LFU, LFUAgeing
from .minimum import Future, Min, MinForced
from .queues import LRU, S3FIFO, LeastStale, Sieve, Static
from .registry import REPLAY_ONLY, PolicyMaker, make_policy, policies

__all__ = [
    "LCP",
    "LFRU",
    "LFU",
    "LRU",
    "REPLAY_ONLY",
    "S3FIFO",
    "Future",
    "LFUAgeing",
    "LeastStale",
    "Min",
    "MinForced",
    "Policy",
    "PolicyBase",
    "PolicyMaker",
    "Sieve",
    "Static",
    "make_policy",
    "placed",
    "policies",
]
