"""Exceptions. Each message says what failed, what was found, what was expected and what to do."""


class DSEEError(Exception):
    """Base of every error that dsee_scale raises on purpose."""


class ConfigError(DSEEError, ValueError):
    """A setting is unknown, out of range, or contradicts another one."""


class TargetError(DSEEError, ValueError):
    """A module that was asked for does not exist, is not supported, or is in the wrong state."""


class PartitionError(DSEEError, RuntimeError):
    """A weight is stored in a way that cannot be read or written here."""


class FormatError(DSEEError, ValueError):
    """A file is damaged, incomplete, of an unknown version, or belongs to another model."""


class RunError(DSEEError, RuntimeError):
    """Training cannot go on as it is set up: the loss or a trained value is NaN or infinite."""


class RunStoppedError(DSEEError, RuntimeError):
    """A run ended before its last step, by SIGTERM or because a rank was lost; a relaunch can go on."""


class CalibrationError(DSEEError, ValueError):
    """Calibration data or statistics that cannot be used: empty, not finite, or of another model."""
