"""The page in a browser without a network."""

import re

import pytest

from neuroal_jax.report import sweep_report
from neuroal_jax.report.run_plots import run_sections
from neuroal_jax.report.sweep_plots import columns
from tests.report.reports import ROWS, sweep_row


@pytest.fixture
def visit(browser):
    """Opens a file without a network; no request leaves it and nothing appears on the console."""
    contexts, noise = [], []

    def visit(path, width=1200, scheme="light"):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or noise.append(request.url))
        page.goto(path.as_uri())
        return page

    yield visit
    for context in contexts:
        context.close()
    assert noise == []


def brightness(page):
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", color)[:3]))


def test_every_plot_of_a_run_is_drawn_from_the_manifest(run, visit):
    page = visit(run[0] / "report.html")
    manifest, sections = run[1], run_sections(*run[1:])
    names = [f"{section.name}-{index}" for section in sections for index in range(len(section.figures))]
    for name in names:
        assert page.locator(f"#{name} svg.main-svg").count() > 0, name
    assert page.locator("#perplexity-0 .point").count() == 2
    assert page.locator("#seconds-0 .point").count() == len(manifest["seconds"])
    assert page.locator("#linear-sparsity-0 .heatmaplayer image, #linear-sparsity-0 .hm").count() > 0
    assert page.locator("#row-sparsity-0 .box").count() == 5
    values = "name => document.getElementById(name).data.map(trace => trace.y)"
    assert page.evaluate(values, "scores-1-0")[0] == manifest["scores"]["row"]
    assert page.evaluate("document.getElementById('perplexity-0').data[0].x")[1] == manifest["token_ppl"]["pruned"]
    drawn = page.evaluate(values, "alignment-0")
    assert drawn == [[block[linear] for block in manifest["alignment"]] for linear in manifest["alignment"][0]]


@pytest.fixture(params=["run", "sweep"])
def report(request, run, tmp_path):
    """The file of a run's report, and of a sweep's with a long name and many lines."""
    if request.param == "run":
        return run[0] / "report.html"
    path = tmp_path / "report.html"
    many = [
        sweep_row(top_up=f"top-up {i}", sparsity=x, pruned_token_ppl=9.0 + i) for i in range(12) for x in (0.5, 0.6)
    ]
    path.write_text(sweep_report([{**row, "model": "a-long-name/of-a-model" * 3} for row in ROWS] + many))
    return path


def test_a_phone_in_the_dark(report, visit):
    page = visit(report, width=390, scheme="dark")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert brightness(page) < 150
    font = "document.querySelector('.plot')._fullLayout.font.color"
    dark = page.evaluate(font)
    page.emulate_media(color_scheme="light")
    for _ in range(100):  # wait_for_function would need eval, which the page's policy forbids
        if page.evaluate(font) != dark:
            break
        page.wait_for_timeout(50)
    assert page.evaluate(font) != dark  # the plots change with the page
    assert brightness(page) > 700


def test_the_table_sorts_by_click_and_key(visit, tmp_path):
    (tmp_path / "report.html").write_text(sweep_report([ROWS[3], *ROWS[:3], ROWS[4]]))  # the failed run first
    page = visit(tmp_path / "report.html")
    head = page.get_by_role("button", name="pruned_token_ppl")
    column = columns(ROWS).index("pruned_token_ppl") + 1

    def shown():
        return page.locator(f"table.sortable tbody td:nth-child({column})").all_inner_texts()

    head.click()
    assert shown() == ["9.75", "18.25", "20", "100.5", ""]
    head.press("Enter")
    assert shown() == ["100.5", "20", "18.25", "9.75", ""]
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("pruned_token_ppl")
    page.get_by_role("button", name="top_up").press("Space")
    assert page.locator("table.sortable tbody td:nth-child(3)").all_inner_texts() == ["owl"] * 4 + ["uniform"]


BOXES = """() => [...document.querySelectorAll(".plot")].map((plot) => {
  const box = (element) => {
    const {left, top, right, bottom} = element.getBoundingClientRect();
    return {name: `${plot.id} ${element.getAttribute("class") ?? element.localName}`, left, top, right, bottom};
  };
  const all = (parent, names) => [...parent.querySelectorAll(names)].map(box).filter((x) => x.right > x.left);
  const headings = all(document, "h2, h3");
  const texts = ".legend, .gtitle, .xtitle, .ytitle, .xtick text, .ytick text, .infolayer .colorbar";
  return {bars: all(plot, ".modebar"), legends: all(plot, ".legend"), texts: [...all(plot, texts), ...headings]};
})"""


def overlap(a, b):
    return a["left"] < b["right"] and b["left"] < a["right"] and a["top"] < b["bottom"] and b["top"] < a["bottom"]


@pytest.mark.parametrize("width", [400, 1200])
def test_the_toolbar_covers_no_text(report, visit, width):
    plots = visit(report, width=width).evaluate(BOXES)
    assert plots
    assert all(len(plot["bars"]) == 1 for plot in plots)
    assert any(plot["legends"] for plot in plots)
    covered = [text["name"] for plot in plots for bar in plot["bars"] for text in plot["texts"] if overlap(bar, text)]
    assert covered == []


def test_the_toolbar_offers_no_upload(report, visit):
    buttons = ".plot:first-of-type .modebar-btn"
    labels = visit(report).locator(buttons).evaluate_all("all => all.map(x => x.getAttribute('aria-label'))")
    known = {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}
    assert set(labels) == known
