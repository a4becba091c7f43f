"""What goes wrong with stored targets."""

from ildistil.capture import CaptureError

__all__ = ["TargetsError"]


class TargetsError(CaptureError):
    """Stored targets are missing, or are not those of this teacher, this data or these objectives."""
