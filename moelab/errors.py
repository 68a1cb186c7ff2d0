"""The errors that moelab raises on purpose.

Each says what was wrong, what was got and what to do about it. They derive from the built-in
exception that a caller would expect (`ValueError`, `RuntimeError`), so code that knows nothing of
moelab still catches them.
"""

from __future__ import annotations


class MoelabError(Exception):
    """Base of every error that moelab raises on purpose."""


class CheckpointError(MoelabError, ValueError):
    """A checkpoint cannot be used: a file is missing, damaged or of a kind that is not read."""


class CapacityError(MoelabError, ValueError):
    """A capacity that the model does not allow."""


class MissActionError(MoelabError, ValueError):
    """A miss action that there is not, or that this model does not allow."""


class PolicyError(MoelabError, ValueError):
    """A replacement policy, pins or initial contents that cannot be used."""


class ReplayError(MoelabError, ValueError):
    """A routing frame that cannot be replayed."""


class StudyError(MoelabError, ValueError):
    """A comparison, sweep, curve, price or forecast that cannot be made from what was given."""


class SchemaError(StudyError):
    """A frame that is not as moelab writes it; the message names the column."""


class ProfileError(MoelabError, ValueError):
    """A profile that is damaged, cannot be made or written, or is of another model."""


class PinsError(MoelabError, ValueError):
    """Pins that the model or its capacity does not allow."""


class NotYetError(MoelabError, NotImplementedError):
    """An option that is part of the interface and not built yet. It is refused, never ignored."""


class AttachedError(MoelabError, RuntimeError):
    """Something that needs all experts was asked of a model that holds only some of them."""


class ClosedError(MoelabError, RuntimeError):
    """A lab, session or recording was used after it was closed."""
