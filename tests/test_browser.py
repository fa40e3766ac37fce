"""The report in a real browser: pointing, searching, the keyboard, three widths, light and dark, and on paper."""

import re

import pytest
from small_models import TEXT, byte_pairs, export, prepare, relation_set

from hgpt.interpret.report import analyse, write_report
from hgpt.interpret.subject import AnalysisSettings

pytestmark = pytest.mark.slow
WIDTHS = (390, 800, 1400)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("browser")
    models = [
        export(root / "harmonic", byte_pairs(300), "harmonic", radius="learned", final_norm="none"),
        export(root / "softmax", byte_pairs(300)),
        export(root / "foreign", byte_pairs(290)),
    ]
    (root / "own.txt").write_text(TEXT[:400])
    settings = AnalysisSettings(
        data=str(prepare(root / "data", byte_pairs(300))),
        relations=relation_set(root / "relations", [("with", "the"), ("on", "with")]),
        text=str(root / "own.txt"),
        bootstrap=100,
    )
    return write_report(analyse([str(model) for model in models], settings), root / "report")


@pytest.fixture
def page(browser, report):
    """The report as opened from its folder; at the end nothing was logged and nothing was fetched."""
    page = browser.new_page(viewport={"width": WIDTHS[-1], "height": 900})
    said, fetched = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: fetched.append(request.url))
    page.goto(report.as_uri())
    yield page
    assert said == [] and fetched == [report.as_uri()]
    page.close()


def card(page) -> str:
    return page.locator("#card header code").inner_text()


def test_every_width_light_and_dark(page):
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.locator("#map").bounding_box()["width"] > 300
        colours = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
        ink, paper = (sum(map(int, re.findall(r"\d+", colour))) for colour in colours)
        assert (ink < paper) == (scheme == "light")


def test_pointing_at_the_map(page):
    ask = page.evaluate
    assert card(page) == ask("chart.label(chart.marked[0])")  # the first of the pinned tokens
    x, y = ask("(chart.draw(), [chart.x[40] / devicePixelRatio, chart.y[40] / devicePixelRatio])")
    page.locator("#map").hover(position={"x": x, "y": y})
    token = ask("chart.nearest(chart.x[40], chart.y[40])")
    near = ask(f'nearestOf(model(), "neighbours", {token}).map(([other]) => chart.label(other))')
    shown = page.locator("#hover").inner_text()
    assert ask(f"chart.label({token})") in shown and near[0] in shown
    page.locator("#map").click(position={"x": x, "y": y})
    assert card(page) == ask(f"chart.label({token})")
    assert page.locator("#card .near .token").all_inner_texts()[:10] == near


def test_frames_of_50_000_points(page):
    """60 frames a second leave 16 ms for each; this machine may be busy."""
    page.evaluate("""() => {
        const axis = () => Float32Array.from({ length: 50000 }, () => Math.random() - 0.5);
        chart.setPoints([axis(), axis(), axis()], true);
        const [colours, shown] = [new Uint32Array(50000).fill(0xff000000), new Uint8Array(50000).fill(1)];
        Object.assign(chart, { colours, shown, marked: [], lines: [] });
    }""")
    assert (
        page.evaluate("""() => {
        const start = performance.now();
        for (let i = 0; i < 30; i++) { chart.view.yaw += 0.01; chart.draw(); }
        return (performance.now() - start) / 30;
    }""")
        < 100
    )


def test_the_map_by_keyboard_and_its_selects(page):
    page.focus("#map")
    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")
    zoomed = page.evaluate("chart.view")
    assert zoomed["zoom"] == 1.5 and zoomed["x"] > 0
    page.select_option("#components", "3")
    page.focus("#map")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("chart.view.yaw") != 0
    colours = set()
    for name in ("frequency", "length |w|", "radius ρ", "kind of token"):
        page.select_option("#colour", name)
        colours.add(page.evaluate("chart.colours.join()"))
    assert len(colours) == 4
    page.select_option("#part", "top100")
    assert page.evaluate("chart.shown.reduce((a, b) => a + b)") == 100
    page.locator('#explorer select[data-side="a"]').select_option("2")  # another tokenizer, no radii
    assert page.evaluate("[chart.size, get('colour').value]") == [290, "kind of token"]
    assert "radius ρ" not in page.locator("#colour option").all_inner_texts()


def test_search_and_pins(page):
    page.fill("#search", "with")
    options = page.locator("#matches [role=option]").all_inner_texts()
    assert {"with", "␣with"} == set(options)
    assert page.evaluate("chart.front.map(chart.label).sort()") == sorted(options)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert card(page) == options[1] and page.locator("#matches li").count() == 0
    facts = page.locator("#card").inner_text()
    parts = "in the training data", "nearest centres, d", "nearest centres, 1 − cosine", "in the text, ", "planted: "
    assert all(part in facts for part in parts)
    assert page.locator("#card mark").first.inner_text() == options[1]
    pinned = page.locator("#pins summary")
    before = pinned.all_inner_texts()
    page.locator("#card .pin").click()
    assert set(pinned.all_inner_texts()) ^ set(before) == {options[1]}
    page.locator("#card .near .token").first.click()
    assert card(page) != options[1]
    page.fill("#search", "zebra")
    assert "no token contains this" in page.locator("#matches").inner_text()
    page.keyboard.press("Escape")
    assert page.input_value("#search") == ""


def test_the_reader_by_keyboard(page):
    assert page.locator(".text [tabindex='0']").count() == 1  # one tab stop
    here = '.side[data-side="a"] .chosen'
    page.locator(".text [tabindex='0']").focus()
    texts = []
    for key, position in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", None), ("Home", 0)):
        page.keyboard.press(key)
        assert position is None or page.locator(here).get_attribute("data-position") == str(position)
        texts.append(page.locator(".side[data-side='a'] .panel").inner_text())
        assert page.evaluate("document.activeElement.className") == "chosen"
    assert len(set(texts)) == 4
    page.keyboard.press("ArrowDown")
    assert int(page.locator(here).get_attribute("data-position")) > 3
    assert page.locator(here).inner_text() == page.locator('.side[data-side="b"] .chosen').inner_text()
    for width in WIDTHS:  # the panel is below its text
        page.set_viewport_size({"width": width, "height": 900})
        text, panel = (page.locator(f".side[data-side='a'] .{name}").bounding_box() for name in ("text", "panel"))
        assert panel["y"] >= text["y"] + text["height"]
    span, shown = page.locator('.side[data-side="a"] [data-position="5"]'), set()
    for quantity in page.locator("#quantity option").all_inner_texts():
        page.select_option("#quantity", quantity)
        shown.add(span.evaluate("span => span.style.background"))
    assert len(shown) == 5
    page.locator('#reading select[data-side="b"]').select_option("2")  # another tokenizer reads the same text
    page.locator('.side[data-side="a"] [data-position="60"]').click()
    best = page.locator(".side[data-side='a'] .panel .token").nth(1)
    token = best.inner_text()
    best.click()
    assert card(page) == token
    assert page.evaluate("get('map').getBoundingClientRect().top < innerHeight")
    starts = page.evaluate("[starts[0][fixed.a], starts[2][fixed.b], starts[2][fixed.b + 1]]")
    assert starts[1] <= starts[0] < starts[2]


def test_on_paper(page):
    page.emulate_media(color_scheme="dark")
    assert page.pdf(format="A4", prefer_css_page_size=True).startswith(b"%PDF")
    page.emulate_media(media="print")
    assert not page.locator(".controls").first.is_visible() and not page.locator("#card").is_visible()
    assert "open the page in a browser" in page.locator("#explorer .print").inner_text()
    assert page.locator(".text").first.evaluate("text => text.scrollHeight <= text.clientHeight")
    assert page.locator("details:not(.pinned):not([open])").count() == 0
