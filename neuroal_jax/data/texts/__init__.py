"""The registry of text sources: texts that are known by name. Imports no JAX and no data sets library."""

from dataclasses import dataclass

from neuroal_jax.registry import Entry, Registry


@dataclass(frozen=True, kw_only=True)
class TextSource(Entry):
    """A text that is known by name, with a training and a test split.

    Its module has

    - `rows(split, column) -> Sequence[str]`: the rows of `train` or `test`, from the Hub or from the package;
    - `text(rows, split) -> Text`: how the paper's code makes a text of them.

    It may also have

    - `row(line) -> str`: the row that a line of a local `.txt` file stands for, line break included. Without it, such
      a file is refused: it does not tell where documents end.

    Attributes:
        hub: Whether it comes from the Hub, so that `NAME=FILE` reads a local file in its place.
        column: Holds the rows' text, on the Hub and in local `.jsonl` and `.parquet` files.
        evaluation_tokens: About how many tokens its evaluation has.
        evaluation_windows: The most windows that an evaluation keeps, for a text that is far longer.
    """

    hub: bool = True
    column: str = "text"
    evaluation_tokens: int | None = None
    evaluation_windows: int | None = None


TEXTS = Registry(
    "neuroal_jax.data.texts",
    {
        "wikitext2": TextSource(help="articles of Wikipedia", evaluation_tokens=340_000),
        "c4": TextSource(help="pages of the web", evaluation_windows=256),
        "ptb": TextSource(help="sentences of the Wall Street Journal", column="sentence", evaluation_tokens=100_000),
        "demo": TextSource(help="comes with the demo model", hub=False, evaluation_tokens=20_000),
    },
)
PAPER_TEXTS = ("wikitext2", "c4", "ptb")  # on which the paper evaluates
