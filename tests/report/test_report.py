"""report.html: its numbers are the manifest's, hostile names stay text, and it works in a browser without a network."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest

import neuroal_jax
from neuroal_jax import report
from neuroal_jax.report.page import run_report, sweep_report
from neuroal_jax.report.recorded import per_linear
from neuroal_jax.report.run_plots import run_sections
from neuroal_jax.report.sweep_plots import columns, sweep_sections

HOSTILE = "</script><img src=x onerror=alert(1)>&\"'"
PLOTS = ("perplexity", "block-sparsity", "linear-sparsity", "row-sparsity", "scores-block", "scores-row", "alignment")


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


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the demo model with both steps: its directory, manifest and allocation."""
    out = tmp_path_factory.mktemp("run") / "out"
    options = {"nsamples": 4, "search_samples": 2, "block_lambdas": "0.1,0.05", "row_lambdas": "0.0,0.1,0.2"}
    neuroal_jax.prune(neuroal_jax.PruneConfig(model="demo", sparsity=0.7, out=str(out), **options))
    return out, *(json.loads((out / name).read_text()) for name in ("manifest.json", "allocation.json"))


@pytest.fixture
def sections(run):
    return {section.name: section for section in run_sections(*run[1:])}


def figure(sections, name):
    (found,) = sections[name].figures.values()
    return found


def trace(figure, name):
    return next(trace for trace in figure["data"] if trace.get("name", "").startswith(name))


def row(**values):
    base = dict.fromkeys(
        ("model", "pruner", "top_up", "sparsity", "seed", "dense_token_ppl", "pruned_token_ppl", "error")
    )
    return {**base, "model": "m", "pruner": "wanda", "top_up": "owl", "sparsity": 0.5, "seed": 0, **values}


ROWS = [
    row(pruned_token_ppl=18.25, dense_token_ppl=16.5),
    row(pruned_token_ppl=100.5, dense_token_ppl=16.5, seed=1),
    row(pruned_token_ppl=9.75, dense_token_ppl=16.5, sparsity=0.7),
    row(top_up="uniform", error="exit code 2: error: no <memory>"),
    row(model="n", pruned_token_ppl=20.0, dense_token_ppl=7.5, acc_mean=0.25),
]


def test_a_run_writes_the_report_of_its_manifest(run):
    out, manifest, allocation = run
    text = (out / "report.html").read_text()
    assert text == run_report(manifest, allocation)
    assert Page(text).json("manifest") == manifest


def test_figures_hold_the_numbers_of_the_manifest(run, sections):
    _, manifest, _ = run
    assert set(sections) == {*PLOTS, "seconds"}
    token_ppl = manifest["token_ppl"]
    assert figure(sections, "perplexity")["data"][0]["x"] == [token_ppl["dense"], token_ppl["pruned"]]
    assert figure(sections, "seconds")["data"][0]["x"] == list(manifest["seconds"].values())
    for step, lambdas in (("block", [0.1, 0.05]), ("row", [0.0, 0.1, 0.2])):
        shown, scores = figure(sections, f"scores-{step}"), manifest["scores"][step]
        candidates, winner = trace(shown, "candidates"), trace(shown, "winner")
        assert dict(zip(candidates["x"], candidates["y"], strict=True)) == dict(zip(lambdas, scores, strict=True))
        assert candidates["x"] == sorted(lambdas)
        assert (winner["x"], winner["y"]) == ([manifest[f"lambda_{step}"]], [min(scores)])
    for line in figure(sections, "alignment")["data"]:
        assert line["y"] == [block[line["name"]] for block in manifest["alignment"]]
    heat = figure(sections, "linear-sparsity")["data"][0]
    for linear, values in zip(heat["y"], heat["z"], strict=True):
        size = math.prod(manifest["linears"][linear])
        assert values == [block[linear] / size for block in manifest["zeros_per_linear"]]
    masks = neuroal_jax.load_masks(run[0] / "masks.safetensors")
    assert per_linear({name: int((~mask).sum()) for name, mask in masks.items()}) == manifest["zeros_per_linear"]


def test_block_sparsities_weigh_linears_by_their_size(run, sections):
    _, manifest, _ = run
    shown, total = figure(sections, "block-sparsity"), sum(map(math.prod, manifest["linears"].values()))
    zeros = [sum(block.values()) for block in manifest["zeros_per_linear"]]
    assert sum(zeros) == manifest["sparsity"]["zeros"]
    assert trace(shown, "achieved")["y"] == pytest.approx([count / total for count in zeros], abs=1e-12)
    assert trace(shown, "allocated")["y"] == pytest.approx(trace(shown, "achieved")["y"], abs=1e-3)
    assert trace(shown, "asked")["y"] == [0.7, 0.7]


def test_row_distributions_are_quantiles_of_the_allocation(run, sections):
    _, _, allocation = run
    blocks = per_linear(allocation["sparsity"])
    shown = sections["row-sparsity"].figures
    assert set(shown) == {linear for block in blocks for linear, value in block.items() if isinstance(value, list)}
    for linear, one in shown.items():
        boxes, ends = one["data"]
        for number, block in enumerate(blocks):
            assert boxes["median"][number] == np.median(block[linear])
            assert boxes["q3"][number] == np.quantile(block[linear], 0.75)
            assert ends["y"][number] == np.min(block[linear])
            assert ends["y"][len(blocks) + number] == np.max(block[linear])


def test_plotly_knows_every_property(run):
    for section in [*run_sections(*run[1:]), *sweep_sections(ROWS), *sweep_sections(ROWS[:2])]:
        for one in section.figures.values():
            go.Figure(one)  # raises for a property that does not exist


def test_what_a_run_lacks_is_told_in_a_sentence(run):
    _, manifest, allocation = run
    lean = json.loads(json.dumps(manifest))
    lean |= {"scores": {"block": [], "row": []}, "lambda_block": None, "lambda_row": None, "alignment": None}
    lean["token_ppl"] |= {"dense": None, "pruned": None, "texts": {}}
    lean["options"] |= {"allocation": "owl", "eval": "none"}
    lean["data"]["eval"] = lean["hashes"]["eval"] = None
    lean["measured"] = {"outliers": [5.5, 2.25, 1.0, 0.5, 0.125]}
    del lean["linears"], lean["zeros_per_linear"]
    flat = {**allocation, "sparsity": dict.fromkeys(allocation["sparsity"], 0.7)}
    sections = {section.name: section for section in run_sections(lean, flat)}
    for name in PLOTS:
        assert sections[name].figures == {}, name
        assert re.match("Not |No ", sections[name].sentence), name
    assert figure(sections, "measured-0")["data"][0]["y"] == lean["measured"]["outliers"]
    assert "Not measured: the run had --eval none." in run_report(lean, flat)
    lean.pop("alignment")
    assert "only a search compares activations" in run_report(lean, flat)


def test_every_text_has_its_bars(run):
    _, manifest, allocation = run
    texts = {name: {**manifest["token_ppl"]["texts"]["demo"], "dense": 1.5, "pruned": 2.5} for name in ("a", "b")}
    several = {**manifest, "token_ppl": {**manifest["token_ppl"], "texts": texts}}
    (bars,) = figure({"perplexity": run_sections(several, allocation)[0]}, "perplexity")["data"]
    assert bars["y"] == ["a, dense", "a, pruned", "b, dense", "b, pruned"]
    assert bars["x"] == [1.5, 2.5, 1.5, 2.5]


def test_a_path_that_is_no_text_is_shown_all_the_same(run):
    _, manifest, allocation = run
    odd = {**manifest, "options": {**manifest["options"], "model": "odd\udcff"}}
    assert "<h1>odd? pruned" in run_report(odd, allocation)


def test_a_row_step_alone_tells_the_score_of_its_base(run):
    _, manifest, allocation = run
    options = {**manifest["options"], "step": "row"}
    lean = {**manifest, "options": options, "lambda_block": None, "scores": {**manifest["scores"], "block": [0.125]}}
    sections = {section.name: section for section in run_sections(lean, allocation)}
    assert "--step row. The uniform allocation under it scored 0.125." in sections["scores-block"].sentence
    assert trace(figure(sections, "scores-row"), "candidates")["y"] == manifest["scores"]["row"]


def test_hostile_names_stay_text(run):
    _, manifest, allocation = run
    options = {**manifest["options"], "model": HOSTILE, "calib": HOSTILE, "allocation": HOSTILE, "out": HOSTILE}
    evil = {
        **manifest,
        "options": options,
        "device": HOSTILE,
        "measured": {HOSTILE: [0.5] * 5},
        "seconds": {HOSTILE: 1.0},
    }
    evil["data"] = {"calib": {**manifest["data"]["calib"], "origin": HOSTILE}, "eval": None}
    rows = [
        row(model=HOSTILE, pruner=HOSTILE, top_up=HOSTILE, error=HOSTILE, pruned_token_ppl=2.0, dense_token_ppl=1.5)
    ]
    for text in (run_report(evil, allocation), sweep_report(rows, [HOSTILE])):
        page = Page(text)
        assert "img" not in page.tags
        assert not [name for name, _ in page.attributes if name.startswith("on")]
        assert page.tags.count("script") == 4
        assert "<img" not in json.dumps([list(one.values()) for one in page.json("figures").values()])
    assert Page(run_report(evil, allocation)).json("manifest") == evil


def test_the_page_needs_no_network_and_runs_no_foreign_script(run):
    text = (run[0] / "report.html").read_text()
    page = Page(text)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    policy = next(value for name, value in page.attributes if value and value.startswith("default-src"))
    assert "default-src 'none'; script-src 'sha256-" in policy
    assert "unsafe" not in policy.split("script-src")[1].split(";")[0]


def test_a_large_model_stays_small(run):
    _, manifest, _ = run
    linears, rng = list(manifest["linears"]), np.random.default_rng(0)
    names = {
        f"model.layers.{block}.{linear}.weight": rng.random(2000).tolist() for block in range(80) for linear in linears
    }
    counts = [dict.fromkeys(linears, 100) for _ in range(80)]
    scores = [dict.fromkeys(linears, rng.random()) for _ in range(80)]
    large = {**manifest, "zeros_per_linear": counts, "alignment": scores}
    own = len(run_report(large, {"sparsity": names})) - len(run_report(manifest, {"sparsity": names}))
    page = Page(run_report(large, {"sparsity": names}))
    assert own < 200_000
    assert len(page.texts["figures"]) + len(page.texts["manifest"]) < 500_000


def test_a_sweep_shows_means_and_spreads_over_seeds(run):
    perplexity, accuracy = sweep_sections(ROWS)
    assert list(perplexity.figures) == ["m", "n"]
    shown = perplexity.figures["m"]
    line = trace(shown, "wanda + owl")
    assert (line["x"], line["y"]) == ([0.5, 0.7], [(18.25 + 100.5) / 2, 9.75])
    assert line["error_y"]["array"] == line["error_y"]["arrayminus"] == [100.5 - 59.375, 0]
    assert trace(shown, "dense")["y"] == [16.5, 16.5]
    assert shown["layout"]["yaxis"]["type"] == "log"
    assert len(shown["data"]) == 2  # nothing for the method whose run failed
    one = perplexity.figures["n"]  # one sparsity: a dot a method
    assert (trace(one, "wanda + owl")["x"], trace(one, "wanda + owl")["y"]) == ([20.0], ["wanda + owl"])
    assert trace(one, "dense")["x"] == [7.5, 7.5]
    assert list(accuracy.figures) == ["n"]


def test_a_sweep_leaves_out_empty_columns_and_tells_failures():
    text = sweep_report(ROWS, ["m/wanda owl/report.html", None, None, None, None])
    assert "lambda" not in columns(ROWS)
    assert "acc_mean" in columns(ROWS)
    assert "5 runs, 1 failed" in text
    assert text.count("no &lt;memory&gt;") == 3  # above the table, in its cell and in that cell's value
    assert 'href="./m/wanda%20owl/report.html"' in text
    assert "No run measured one so far." in sweep_report([ROWS[3]])


def test_the_command_writes_the_report_again(run, tmp_path, capsys):
    out = shutil.copytree(run[0], tmp_path / "run")
    (out / "report.html").unlink()
    assert report.main([str(out)]) == 0
    assert (out / "report.html").read_bytes() == (run[0] / "report.html").read_bytes()
    assert {path.name for path in out.iterdir()} == {path.name for path in run[0].iterdir()}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", None, "cannot be read"),
        ("allocation.json", None, "cannot be read"),
        ("manifest.json", "{", "cannot be read"),
        ("manifest.json", "[]", "format is 'list'"),
        ("allocation.json", '{"format": "x"}', "format is 'x'"),
        ("manifest.json", '{"format": "neuroal-manifest-1"}', "damaged or of another version"),
        ("allocation.json", '{"format": "neuroal-allocation-1", "sparsity": {"norm": 0.5}}', "names norm"),
        ("allocation.json", '{"format": "neuroal-allocation-1", "sparsity": {"layers.1.fc": 0.5}}', "all from 0 on"),
        ("allocation.json", '{"format": "neuroal-allocation-1", "sparsity": {"layers.0.fc": NaN}}', "damaged"),
    ],
)
def test_a_damaged_run_is_one_line_and_keeps_its_report(run, tmp_path, capsys, name, content, message):
    out = shutil.copytree(run[0], tmp_path / "run")
    (out / "report.html").write_text("before")
    (out / name).unlink()
    if content is not None:
        (out / name).write_text(content)
    assert report.main([str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (out / "report.html").read_text() == "before"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium: install it to test the reports in a browser")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


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
    assert page.evaluate(values, "scores-row-0")[0] == manifest["scores"]["row"]
    assert page.evaluate("document.getElementById('perplexity-0').data[0].x")[1] == manifest["token_ppl"]["pruned"]
    drawn = page.evaluate(values, "alignment-0")
    assert drawn == [[block[linear] for block in manifest["alignment"]] for linear in manifest["alignment"][0]]


@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_a_phone_in_the_dark(run, visit, tmp_path, kind):
    path = run[0] / "report.html"
    if kind == "sweep":
        path = tmp_path / "report.html"
        path.write_text(sweep_report([{**one, "model": "a-long-name/of-a-model" * 3} for one in ROWS]))
    page = visit(path, width=390, scheme="dark")
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
