"""The one exception for a file that is no image which can be decoded."""


class BadImage(Exception):
    """The bytes are no image that can be decoded; the message says why."""
