"""The analytic cost table, and reading, comparing and drawing what was recorded. Needs no torch."""


class UserError(Exception):
    """What a user should change, in one sentence."""
