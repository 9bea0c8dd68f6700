"""Output whose reader is gone: a terminal that hung up, a pipe whose end died. No reason to end a run."""

from typing import Any


class Outlasting:
    """A text stream that takes what can no longer be written, and says nothing."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except (OSError, ValueError):  # ValueError: closed
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError, AttributeError):  # what notebooks put there may have none
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
