"""Errors a user can cause and can fix. The command line prints them as one or two lines, without a traceback."""

from __future__ import annotations


class PygptError(Exception):
    """Base class: the message says what was wrong and what to do about it."""


class InputError(PygptError, ValueError):
    """A value, shape, setting or file content that cannot be used."""


class InputTypeError(PygptError, TypeError):
    """An argument of the wrong type or dtype."""


class MissingFileError(PygptError, FileNotFoundError):
    """A file or folder that is needed and is not there."""
