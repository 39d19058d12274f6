"""The exceptions that a user is meant to read."""

_LONGEST = 2000  # characters of a message


class UserError(Exception):
    """A problem in what the user gave: one line, naming what was found, what was expected and what to do next.

    The command line prints the message without a traceback and exits with code 2. What a file or an option brings into
    the message can neither command the terminal nor flood it.

    Args:
        message: What is wrong. Line ends become spaces, and characters that are not printable become escapes.

    Example:
        >>> import neuroal_jax
        >>> try:
        ...     neuroal_jax.PruneConfig(model="demo", sparsity=1.5)
        ... except neuroal_jax.UserError as error:
        ...     print(error)
        --sparsity is 1.5, expected a number between 0 and 1, both excluded
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """A message as one printable line of bounded length, whatever it quotes."""
    text = " ".join(message.split())
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class OtherProcessFailed(UserError):
    """What ended another process of the run; this one might have gone on."""


class IllegalCombination(UserError):
    """Options that are each fine, of methods that do not go together."""


def shorten(items: list[str], limit: int = 5) -> str:
    """Joins the first `limit` items and counts the rest, so that a list of problems stays on one line."""
    shown = "; ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown}; and {len(items) - limit} more"
