"""The error that a broken invariant of the storage raises."""


class IntegrityError(AssertionError):
    """An invariant of the paged storage does not hold: a bug in this package, never the user's."""
