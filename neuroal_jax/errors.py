"""The exceptions that a user is meant to read."""


class UserError(Exception):
    """A problem in what the user gave: one line, naming what was found, what was expected and what to do next.

    The command line prints the message without a traceback and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class IllegalCombination(UserError):
    """Options that are each fine, of methods that do not go together."""


def shorten(items: list[str], limit: int = 5) -> str:
    """Joins the first `limit` items and counts the rest, so that a list of problems stays on one line."""
    shown = "; ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown}; and {len(items) - limit} more"
