"""Pages from the templates in assets/, each one file that needs no network."""

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from neuroal_jax.files.writing import strict
from neuroal_jax.report.figures import Section


def render(template: str, title: str, sections: Sequence[Section], source: Any, **content: Any) -> str:
    """A page with its plots.

    Args:
        template: Its file in assets/.
        title: Plain text.
        sections: The parts with plots.
        source: What the page was made from; it is in the page too, as JSON.
        **content: What else the template shows.

    Raises:
        ValueError: If the source holds NaN, or a figure a number that is not finite.
    """
    environment = _environment()
    figures = {
        f"{section.name}-{index}": figure.to_plotly_json()
        for section in sections
        for index, figure in enumerate(section.figures.values())
    }
    scripts = [get_plotlyjs(), _asset(environment, "page.js")]
    page = environment.get_template(template).render(
        title=title,
        sections=sections,
        source=strict(source),
        figures=figures,
        style=Markup(_asset(environment, "style.css")),  # noqa: S704 (our own file)
        scripts=[Markup(script) for script in scripts],  # noqa: S704 (our own, and plotly.js)
        hashes=[_source_hash(script) for script in scripts],
        **content,
    )
    return page.encode("utf-8", "replace").decode()  # a path may hold bytes that are no text


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("neuroal_jax.report", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # and keys as they come, not sorted
    return environment


def _asset(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]


def _source_hash(script: str) -> Markup:
    """Names a script in the page's security policy: no other one runs."""
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'")  # noqa: S704 (base64)
