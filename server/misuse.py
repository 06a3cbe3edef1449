"""The error of whoever uses the command line wrongly."""


class MisuseError(Exception):
    """Options that cannot be: the command ends with exit code 2."""
