"""Errors a user can do something about; each message is one sentence that names the fix."""

from __future__ import annotations

__all__ = ["InputError", "NoStablePointError", "NotConvergedError", "VoltPIError"]


class VoltPIError(Exception):
    """Base of all errors that VoltPI raises on purpose (exit status 1: failed while running)."""


class InputError(VoltPIError, ValueError):
    """Input that cannot be right (exit status 2); the message names file, key, value and fix."""


class NoStablePointError(VoltPIError):
    """Charges and shells have no stable stationary point (polarization catastrophe)."""


class NotConvergedError(VoltPIError):
    """The solver for charges and shells did not reach its tolerance."""
