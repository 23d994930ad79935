"""A report as its readers see it: opened in a browser, on a telephone and on a wide screen, by day and by night."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from browser import Browser, find
from made_reports import large_report, small_report

from zoo.harness.drawing import palette
from zoo.harness.report import write_report
from zoo.inspect.inspection import Settings
from zoo.inspect.report import inspect, write_inspection
from zoo.inspect.text import read_text
from zoo.weights.loading import load_with_tokenizer

pytestmark = pytest.mark.browser

NOISE = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed")
"""Events of a page that has something to complain about."""

PLOTS = """Promise.all([...document.querySelectorAll("figure svg")].map(async svg => {
    const pictures = [...svg.querySelectorAll("image")].map(async image => {
        const picture = new Image();
        picture.src = image.href.baseVal;
        await picture.decode();
        return [picture.naturalWidth, picture.naturalHeight];
    });
    const {x, y, width, height} = svg.getBoundingClientRect();
    return {
        label: svg.getAttribute("aria-label"), visible: svg.checkVisibility(), pictures: await Promise.all(pictures),
        box: [x + scrollX, y + scrollY, width, height].map(Math.round),
    };
}))"""

SMALLEST_TEXT = """Math.min(...[...document.querySelectorAll("body *")].filter(
    element => [...element.childNodes].some(node => node.nodeType == 3 && node.data.trim()) && element.checkVisibility()
).map(element => {
    const svg = element.closest("svg");
    const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    return parseFloat(getComputedStyle(element).fontSize) * scale;
}))"""

OVERLAPS = """[...document.querySelectorAll("figure svg")].flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
    const over = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
    const outside = box => box.left < frame.left - 1 || box.right > frame.right + 1
        || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
    const title = svg.getAttribute("aria-label");
    return texts.flatMap(([one, a], i) => [
        ...(outside(a) ? [`${title}: ${one} is cut off`] : []),
        ...texts.slice(i + 1).filter(([_, b]) => over(a, b)).map(([other]) => `${title}: ${one} over ${other}`),
    ]);
})"""

WIDER_THAN_THE_PAGE = """[...document.querySelectorAll("body *")].filter(element =>
    !element.closest("svg") && !element.parentElement.closest(".wide, pre") && element.checkVisibility()
    && (element.getBoundingClientRect().right > innerWidth + 0.5
        || !element.matches(".wide, pre") && element.clientWidth && element.scrollWidth > element.clientWidth + 1)
).map(element => `${element.tagName} ${element.textContent.slice(0, 40)}`)"""

COLOURS = """(names => ({
    page: getComputedStyle(document.body).backgroundColor, text: getComputedStyle(document.body).color,
    link: getComputedStyle(document.querySelector("nav a")).color,
    figure: getComputedStyle(document.querySelector("figure svg text")).fill,
    ...Object.fromEntries(names.map(name => [name, getComputedStyle(document.body).getPropertyValue(name)])),
}))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = find()
    assert path, "these tests need Chromium or Chrome: install one (Debian and Ubuntu: apt install chromium)"
    with Browser(path) as started:
        yield started


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of a small report, of a large one, which has all that makes pages wide, and of an inspection."""
    made = {"small": small_report(), "large": large_report()}
    pages = {name: write_report(report, tmp_path_factory.mktemp(name))[1] for name, report in made.items()}
    return pages | {"routers": inspection(tmp_path_factory.mktemp("routers"))}


def inspection(directory: Path) -> Path:
    """The page of ``zoo inspect`` with every section, of a model with many experts and shared ones."""
    texts = {"capitals": "The capital of Ghana is Accra.\n", "questions": "Question: Is Oslo in Norway?\nAnswer: yes\n"}
    for name, text in texts.items():
        (directory / f"{name}.txt").write_text(60 * text, encoding="utf-8")
    model, tokenizer = load_with_tokenizer("facts-deepseek-moe", device="cpu")
    given = [read_text(str(directory / f"{name}.txt"), tokenizer, 1000) for name in texts]
    other = {"an-earlier-checkpoint-of-the-run": lambda: model}
    return write_inspection(inspect("facts-deepseek-moe", model, tokenizer, given, Settings(), other), directory)[0]


PAGES = [("small", 400), ("large", 400), ("large", 1400), ("routers", 400), ("routers", 1400)]


@pytest.fixture(scope="module", params=PAGES, ids=str)
def page(request: pytest.FixtureRequest, browser: Browser, reports: dict[str, Path]) -> Browser:
    """The browser with a report open in it."""
    name, width = request.param
    browser.open(reports[name], width)
    return browser


def test_page_says_nothing_on_the_console_and_asks_the_network_for_nothing(page: Browser) -> None:
    methods = [str(event.get("method")) for event in page.events]
    assert not [event for event, method in zip(page.events, methods, strict=True) if method in NOISE]
    asked = [e["params"]["request"]["url"] for e in page.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.evaluate("location.href")]


def test_every_plot_is_drawn(page: Browser, tmp_path: Path) -> None:
    plots = page.evaluate(PLOTS)
    assert len(plots) == page.evaluate("document.querySelectorAll('figure').length") >= 10
    page.screenshot(tmp_path / "page.png")
    pixels = (255 * matplotlib.image.imread(tmp_path / "page.png")[..., :3]).astype(np.int64) @ (1, 256, 256**2)
    for plot in plots:
        x, y, width, height = plot["box"]
        assert plot["visible"] and width > 300 and height > 100, plot
        heat_map = re.search("load|fire|chosen|Similarity", plot["label"].partition(".")[0])
        assert len(plot["pictures"]) >= (2 if heat_map else 0), f"{plot['label']}: map and colours are pictures"
        assert all(min(picture) > 0 for picture in plot["pictures"]), plot
        assert len(np.unique(pixels[y : y + height, x : x + width])) > 20, f"{plot['label']}: it is empty"


def test_page_is_readable_at_its_width(page: Browser) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(WIDER_THAN_THE_PAGE) == []
    assert page.evaluate(SMALLEST_TEXT) >= 12.5
    assert page.evaluate(OVERLAPS) == []


def test_these_checks_see_what_they_look_for(browser: Browser, reports: dict[str, Path]) -> None:
    browser.open(reports["small"], 400)
    browser.evaluate(
        "document.querySelector('svg text').style.font = '200px sans-serif';"
        "document.querySelector('p').style.fontSize = '9px';"
        "document.querySelector('p').style.width = '900px';"
        "document.querySelector('h1').insertAdjacentHTML('beforeend', '<img src=https://example.org/a.png>');"
        "console.error('here'); null"
    )
    assert any("cut off" in text or "over" in text for text in browser.evaluate(OVERLAPS))
    assert browser.evaluate(SMALLEST_TEXT) == 9
    assert any(text.startswith("P ") for text in browser.evaluate(WIDER_THAN_THE_PAGE))
    logged = [event for event in browser.events if event.get("method") in NOISE]
    assert any("here" in str(event) for event in logged) and any("Content Security" in str(event) for event in logged)


def test_tables_scroll_in_their_own_box(browser: Browser, reports: dict[str, Path]) -> None:
    browser.open(reports["large"], 400)
    boxes = browser.evaluate(
        "[...document.querySelectorAll('.wide')].map(box => [box.scrollWidth > box.clientWidth, "
        "getComputedStyle(box).overflowX, box.tabIndex, box.getAttribute('aria-label') != ''])"
    )
    assert any(wider for wider, *_ in boxes) and all(rest == ["auto", 0, True] for _, *rest in boxes)
    assert browser.evaluate("[...document.querySelectorAll('th')].every(cell => cell.scope)")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_colours_stand_out_from_the_page(browser: Browser, reports: dict[str, Path], dark: bool) -> None:
    """By WCAG 2.2: text by 4.5 : 1, what is drawn by 3 : 1."""
    browser.open(reports["small"], 400, dark)
    names = re.findall(r"--\w+", palette(dark))
    found: dict[str, Any] = browser.evaluate(f"{COLOURS}({names})")
    page = _luminance(found.pop("page"))
    assert (page < 0.1) == dark
    contrast = {name: _contrast(_luminance(colour), page) for name, colour in found.items()}
    assert min(contrast[name] for name in ("text", "link", "figure")) >= 4.5, contrast
    assert min(contrast.values()) >= 3 and len(contrast) == 11, contrast


def _contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def _luminance(colour: str) -> float:
    """Of ``rgb(r, g, b)`` or ``#rrggbb``."""
    numbers = [int(c, 16) for c in re.findall("[0-9a-f]{2}", colour)] if "#" in colour else re.findall(r"\d+", colour)
    shares = [int(c) / 255 for c in numbers[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
