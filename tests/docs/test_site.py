"""The site, opened from a disk: it asks nobody for anything, its search finds, its pages fit a narrow screen."""

import subprocess
import sys

import pytest

from tests.docs.pages import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture
def page(browser):
    """A narrow, dark page without a network; at the end nothing was asked of anyone and nothing went wrong."""
    noise = []
    context = browser.new_context(viewport={"width": 400, "height": 900}, color_scheme="dark", offline=True)
    page = context.new_page()
    page.on("console", lambda message: noise.append(message.text))
    page.on("pageerror", lambda error: noise.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or noise.append(request.url))
    yield page
    context.close()
    assert noise == []


def test_every_page_is_whole_without_a_network_and_fits_a_narrow_screen(site, page):
    files = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    assert len(files) > 25
    for file in files:
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, file.relative_to(site)
        assert page.evaluate("getComputedStyle(document.body).colorScheme") == "dark"
        assert "<!-- part:" not in page.content()


def test_search_finds_an_option_from_a_disk(site, page):
    page.goto((site / "index.html").as_uri())
    page.locator("label[for=__search]").first.click()
    page.locator(".md-search__input").type("nsamples")
    page.locator(".md-search-result__link[href*='command-line']").first.wait_for()


def test_the_house_stands_in_its_page(site, page):
    page.goto((site / "develop" / "house.html").as_uri())
    assert page.locator(".house rect").count() > 15
    assert page.locator(".house-import").count() > 15
