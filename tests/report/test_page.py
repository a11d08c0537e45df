"""Pages open from disk, and what is text stays text."""

import html.parser

import pytest

from pipeline.report.page import Page, bytes_text, log_axis, seconds_text


class Checker(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.text, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def parsed(page):
    checker = Checker()
    checker.feed(page.html())
    return checker


HOSTILE = '<img src=x onerror="alert(1)">&amp;'


def test_text_is_never_markup():
    page = Page(HOSTILE)
    page.heading(HOSTILE)
    page.paragraph(HOSTILE)
    page.code(HOSTILE)
    page.items([HOSTILE])
    page.table([HOSTILE], [[HOSTILE]], chosen=0)

    found = parsed(page)

    assert "img" not in found.tags
    assert found.text.count(HOSTILE) == 8  # the title twice


def test_the_library_comes_once_and_from_the_page():
    from plotly.graph_objects import Figure

    page = Page("two plots")
    for name in ("first", "</script><img>"):
        figure = Figure()
        figure.add_scatter(x=[1], y=[2], name=name)
        page.plot(figure)
    html = page.html()

    assert html.count("plotly.js v") == 1
    assert "cdn.plot.ly/plotly" not in html.replace("plotlyServerURL", "").split("<main>")[0]
    assert "img" not in parsed(page).tags


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0042, "4.2 ms"), (1.25, "1.2 s"), (600, "10.0 min"), (None, "–")]
)
def test_seconds(seconds, text):
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"), [(12, "12 B"), (2_400_000, "2.4 MB"), (7.5e9, "7.5 GB"), (None, "–")]
)
def test_bytes(size, text):
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("values", "within"),
    [
        ([1.5, 8.0], ["2", "5"]),
        ([0.03, 4000.0], ["0.1", "1", "10", "100", "1,000"]),
        ([0.0], ["1"]),
    ],
)
def test_every_logarithmic_axis_has_labels_between_what_it_shows(values, within):
    axis = log_axis(values)

    pairs = zip(axis["tickvals"], axis["ticktext"], strict=True)
    low, high = min(values) or 1, max(values) or 1
    assert [text for tick, text in pairs if low <= tick <= high] == within
