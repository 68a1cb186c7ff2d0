"""`moelab check`: what moelab promises, measured on the user's own machine."""

from __future__ import annotations

from .report import CheckReport
from .run import check

__all__ = ["CheckReport", "check"]
