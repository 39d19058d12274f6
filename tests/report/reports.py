"""What the tests of reports share."""

import json
from html.parser import HTMLParser


class Page(HTMLParser):
    """Elements of a page, and the text of those with an id."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self._inside = [], [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = dict(attrs).get("id") if tag == "script" else None

    def handle_data(self, data):
        if self._inside:
            self.texts[self._inside] = self.texts.get(self._inside, "") + data

    def json(self, name):
        return json.loads(self.texts[name])


def figure(sections, name):
    """The only figure of a section."""
    (found,) = sections[name].figures.values()
    return found


def trace(figure, name):
    """The first trace whose name starts so."""
    return next(trace for trace in figure.data if (trace.name or "").startswith(name))


def sweep_row(**values):
    base = dict.fromkeys(
        ("model", "pruner", "top_up", "sparsity", "seed", "dense_token_ppl", "pruned_token_ppl", "error")
    )
    return {**base, "model": "m", "pruner": "wanda", "top_up": "owl", "sparsity": 0.5, "seed": 0, **values}


ROWS = [
    sweep_row(pruned_token_ppl=18.25, dense_token_ppl=16.5),
    sweep_row(pruned_token_ppl=100.5, dense_token_ppl=16.5, seed=1),
    sweep_row(pruned_token_ppl=9.75, dense_token_ppl=16.5, sparsity=0.7),
    sweep_row(top_up="uniform", error="exit code 2: error: no <memory>"),
    sweep_row(model="n", pruned_token_ppl=20.0, dense_token_ppl=7.5, acc_mean=0.25),
]
