"""The pages in a real browser, with the network off: what one sees equals the files.

Chromium is Debian's (`apt install chromium`); where there is none these tests are skipped.
"""

import itertools
import os
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import sync_playwright
from tiny import tiny_model, tiny_tokenizer

import entropylens
from entropylens.contrast import contrast
from entropylens.report.comparison import comparison_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt install chromium")

LINES = [
    {"prompt": f"{place}+{place}=", "response": f"{place} is what\nit <is>{'!' * (place % 5)}"}
    for place in range(1, 9)
]
#: A page is ready when every chart is drawn.
READY = "html[data-ready=yes]"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    entropylens.analyze(
        tiny_model("llama"), LINES, tokenizer=tiny_tokenizer(), output=path, reading="both",
        progress=False,
    )  # fmt: skip
    return path


@pytest.fixture
def show(browser):
    """Open a file with the network off; anything that the console says is a failure."""
    contexts, said = [], []

    def shown(file, **options):
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url))
        page.goto(file.as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_selector(READY, timeout=120_000)
        assert said.pop(0) == file.as_uri()  # the only thing that was asked for
        return page

    yield shown
    for context in contexts:
        context.close()
    assert said == []


def point_at(page, chart, layer, row=""):
    """Move the mouse over a layer of a chart and return what the hover label tells."""
    place = page.evaluate(
        """([chart, layer, row]) => {
            const plot = document.querySelector(`#${chart} .plot`);
            plot.scrollIntoView({block: "center"});
            const layout = plot._fullLayout, box = plot.getBoundingClientRect();
            const x = layout.xaxis, y = layout[`yaxis${row}`];
            return [box.left + x._offset + x.l2p(layer), box.top + y._offset + y._length / 2];
        }""",
        [chart, layer, row],
    )
    page.mouse.move(place[0] - 3, place[1])
    page.mouse.move(*place)
    page.wait_for_selector(f"#{chart} .hoverlayer text")
    page.wait_for_timeout(150)  # Plotly waits that long between two labels
    return " ".join(page.locator(f"#{chart} .hoverlayer text").all_text_contents())


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hovering_tells_what_layers_csv_has(run, show, scheme):
    page = show(run / "report.html", color_scheme=scheme)
    layers = pd.read_csv(run / "layers.csv")
    for layer in layers["layer"]:
        row = layers.set_index("layer").loc[layer]
        told = point_at(page, "change", layer)
        for name in ("delta_attn", "control_delta_attn", "delta_ffn", "control_delta_ffn"):
            assert f"{row[name]:.4f}".replace("-", "\u2212") in told.replace("-", "\u2212")
        told = point_at(page, "normed_change", layer, "2")
        assert f"{row['normed_delta_ffn']:.4f}".replace("-", "\u2212") in told.replace(
            "-", "\u2212"
        )
        told = point_at(page, "scale", layer)
        for name in ("rms_layer", "rms_attn", "rms_ffn"):
            assert f"{row[name]:.4f}" in told


def test_beside_a_point_and_zoomed_the_nearest_layer_is_told(run, show):
    page = show(run / "report.html")
    page.evaluate(
        "Plotly.relayout(document.querySelector('#change .plot'), {'xaxis.range': [1.5, 2.8]})"
    )
    row = pd.read_csv(run / "layers.csv").set_index("layer").loc[2]
    assert f"{row['delta_attn']:.4f}".replace("-", "\u2212") in point_at(page, "change", 2.3)


def test_no_button_of_a_chart_leads_away(run, browser):
    context = browser.new_context(offline=True)
    asked = []
    context.on("request", lambda request: asked.append(request.url))
    context.on("page", lambda page: asked.append("another page"))
    page = context.new_page()
    asked.clear()
    page.goto((run / "report.html").as_uri())
    page.wait_for_selector(READY, timeout=120_000)
    page.hover("#change .plot")
    buttons = page.locator("#change .modebar-btn")
    assert buttons.count() == 4
    for place in range(buttons.count()):
        buttons.nth(place).click()
    page.wait_for_timeout(500)
    assert [it for it in asked if not it.startswith(("file:", "blob:", "data:"))] == []
    context.close()


def test_printed_it_is_light_and_whole(run, show):
    page = show(run / "report.html", color_scheme="dark")
    page.emulate_media(media="print")
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert luminance(ink) < 80
    assert page.locator("#layers thead th", has_text="delta_ffn").first.is_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('.wide')).overflow") == "visible"


def test_the_keyboard_reads_a_chart(run, show):
    page = show(run / "report.html")
    layers = pd.read_csv(run / "layers.csv").set_index("layer")
    page.focus("#change .plot")
    for layer in (1, 2, 3):
        page.keyboard.press("ArrowRight")
        told = page.inner_text("#change .told")
        assert told.startswith(f"layer {layer}: ")
        for name in ("delta_attn", "delta_ffn", "control_delta_ffn"):
            assert f" {name} {layers.loc[layer, name]:.4f}" in told
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#change .told").startswith("layer 2: ")


def test_everything_is_reached_with_the_keyboard(run, show):
    page = show(run / "report.html")
    wanted = [
        "#theme", ".plot", ".legend button", "#response", "#token-view td", "summary",
        "#token-view input", ".wide th button", "[data-file='layers.csv']", "nav a",
    ]  # fmt: skip
    reached = set()
    for _ in range(150):
        page.keyboard.press("Tab")
        matching = "wanted => wanted.filter(it => document.activeElement.matches(it))"
        reached |= set(page.evaluate(matching, wanted))
    assert reached == set(wanted)


def test_the_legend_hides_and_shows(run, show):
    page = show(run / "report.html")
    button = page.locator("#change .legend button", has_text="attention")
    shown = "document.querySelector('#change .plot').data.filter(it => it.name === 'attention')"
    shown += ".map(it => it.visible !== false)"
    assert all(page.evaluate(shown))
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert page.evaluate(shown) == [False] * len(page.evaluate(shown))
    button.click()
    assert all(page.evaluate(shown))


def test_dragging_zooms(run, show):
    page = show(run / "report.html")
    page.locator("#cosine").scroll_into_view_if_needed()
    extent = "document.querySelector('#cosine .plot').layout.xaxis.range"
    before = page.evaluate(extent)
    box = page.locator("#cosine .plot").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 500, box["y"] + 250, steps=5)
    page.mouse.up()
    page.wait_for_timeout(200)
    low, high = page.evaluate(extent)
    assert high - low < 0.8 * (before[1] - before[0])


def test_a_token_tells_what_was_kept(run, show):
    page = show(run / "report.html")
    tokens = pd.read_parquet(run / "tokens.parquet")
    layers = tokens["layer"].max()
    for response, layer, position in itertools.product((1, 3), (1, layers), (1, 4)):
        page.select_option("#response", str(response))
        cell = page.locator("#token-view tbody tr").nth(int(layers) - layer).locator("td")
        cell.nth(position - 1).hover()
        told = page.inner_text("#told-token")
        ids = tokens["response_id"].unique()
        row = tokens[
            (tokens["response_id"] == ids[response - 1])
            & (tokens["layer"] == layer)
            & (tokens["position"] == position)
        ].iloc[0]
        assert f"entropy_layer {row['entropy_layer']:.4g}" in told
        assert f"rank of the produced token: {row['rank']}" in told
        for place, (top, prob) in enumerate(zip(row["top_tokens"], row["top_probs"], strict=True)):
            assert f"{place + 1}. {top!r} {prob:.3f}" in told


def test_the_keyboard_goes_from_token_to_token(run, show):
    page = show(run / "report.html")
    page.focus("#token-view td")
    assert "layer 4, position 1" in page.inner_text("#told-token")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "ArrowLeft"):
        page.keyboard.press(key)
    assert "layer 3, position 2" in page.inner_text("#told-token")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")  # there is nothing above
    assert "layer 4, position 2" in page.inner_text("#told-token")


def test_two_views_in_one_page_keep_their_colours(run, show, tmp_path):
    """What each kept differs; a style sheet holds for a whole notebook."""
    analysis = entropylens.Analysis.load(run)
    other = entropylens.analyze(
        tiny_model("llama"), LINES, tokenizer=tiny_tokenizer(), keep_tokens=["delta_layer"],
        top_tokens=3, progress=False,
    )  # fmt: skip
    view = analysis.token_view(1, "delta_layer").html
    colours = []
    for more in ("", other.token_view(1, "delta_layer").html):
        file = tmp_path / f"views{len(more)}.html"
        file.write_text(f"<meta charset=utf-8><html data-ready=yes>{view}{more}")
        page = show(file)
        cells = "[...document.querySelector('.token-view').querySelectorAll('td')]"
        colours.append(page.evaluate(f"{cells}.map(it => getComputedStyle(it).backgroundColor)"))
    assert colours[0] == colours[1]


@pytest.mark.parametrize("scripts", [True, False])
def test_the_colour_of_tokens_is_chosen_without_a_script(run, show, tmp_path, scripts):
    analysis = entropylens.Analysis.load(run)
    file = tmp_path / "view.html"
    file.write_text(f"<meta charset=utf-8><html data-ready=yes>{analysis.token_view(1).html}")
    page = show(file, java_script_enabled=scripts)
    cell = page.locator(".token-view td").first
    row = analysis.tokens[analysis.tokens["layer"] == 4].iloc[0]
    assert cell.inner_text() == ""
    for name in ("delta_layer", "top_token", "entropy_layer"):
        page.check(f"input[value={name}]")
        assert page.locator(".token-view .scale:visible").count() == 1
        page.keyboard.press("Enter")  # must not leave the page
    page.check("input[value=top_token]")
    assert cell.inner_text().strip() == row["top_tokens"][0].strip().replace("\n", "\u21b5")


def test_the_table_sorts_and_downloads(run, show, tmp_path):
    page = show(run / "report.html")
    layers = pd.read_csv(run / "layers.csv")
    head = page.locator("#layers thead th", has_text=re.compile("^delta_ffn$"))
    first = "#layers tbody tr:first-child td:first-child"
    head.locator("button").click()
    assert page.inner_text(first) == str(layers.loc[layers["delta_ffn"].idxmin(), "layer"])
    assert head.get_attribute("aria-sort") == "ascending"
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert page.inner_text(first) == str(layers.loc[layers["delta_ffn"].idxmax(), "layer"])
    with page.expect_download() as download:
        page.click("[data-file='layers.csv']")
    download.value.save_as(tmp_path / "got.csv")
    assert (tmp_path / "got.csv").read_bytes() == (run / "layers.csv").read_bytes()


def luminance(color):
    red, green, blue = map(int, re.findall(r"\d+", color)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize(("scheme", "ground"), [("light", 255), ("dark", 24)])
def test_both_themes(run, show, scheme, ground):
    page = show(run / "report.html", color_scheme=scheme)
    body = "getComputedStyle(document.body).backgroundColor"
    ink = "getComputedStyle(document.querySelector('#change .ytick text')).fill"
    assert luminance(page.evaluate(body)) == pytest.approx(ground, abs=12)
    assert abs(luminance(page.evaluate(ink)) - luminance(page.evaluate(body))) > 150
    page.click("#theme")
    page.wait_for_timeout(200)
    assert luminance(page.evaluate(body)) == pytest.approx(279 - ground, abs=12)
    assert abs(luminance(page.evaluate(ink)) - luminance(page.evaluate(body))) > 150


@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_a_phone(run, show, width):
    page = show(run / "report.html", viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    widths = page.evaluate(
        "[...document.querySelectorAll('.plot .main-svg')].map(it => it.clientWidth)"
    )
    assert max(widths) <= width
    assert min(widths) > 0.85 * min(width, 1000)


def test_several_models_in_one_page(run, show, tmp_path):
    other = [line | {"response": line["response"][::-1]} for line in LINES]
    models = {
        "a": entropylens.Analysis.load(run),
        "b": entropylens.analyze(
            tiny_model("llama", seed=5), other, tokenizer=tiny_tokenizer(), reading="both",
            progress=False,
        ),
    }  # fmt: skip
    found = contrast(models["a"], models["b"], ("a", "b"))
    file = tmp_path / "comparison.html"
    file.write_text(comparison_page(models, [found]), encoding="utf-8")
    page = show(file)
    rows = found.frame[found.frame["quantity"] == "delta_ffn"].set_index("layer")
    page.focus("#difference .plot")
    for layer in rows.index:
        page.keyboard.press("ArrowRight")
        value = f"b - a delta_ffn {rows.loc[layer, 'difference']:.4f}"
        assert value in page.inner_text("#difference .told")
    assert "own responses to the same problems" in page.inner_text("main")
    assert np.isfinite(rows["low"]).all()
