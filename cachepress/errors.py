"""Errors that a user can act on: each says what was got, what was wanted and what to do."""


class CachepressError(ValueError):
    """Base of every error that cachepress raises on purpose; its text is one line."""


class UnsupportedError(CachepressError):
    """A model, cache or combination that cachepress refuses instead of computing a wrong result."""


class ForeignAttentionError(CachepressError):
    """A compressed cache met an attention function that cannot read it."""
