"""Errors that bad input causes; the command line turns them into one line and exit code 2."""


class InputError(ValueError):
    """Input that cannot be used: the message names it, its value, and what would be right."""


class ConfigError(InputError):
    """A configuration field with an unknown or impossible value."""


class CheckpointError(InputError):
    """A checkpoint that is missing, incomplete, or does not fit its configuration."""


class VideoError(InputError):
    """A video that cannot be opened or decoded, or frames of the wrong kind."""


class TrainingError(InputError):
    """A training run that cannot go on; the message says from where it can be resumed."""
