"""The page of a report: whole in itself, told in words too, and read by a browser on a phone and in the dark."""

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser

import PIL.Image
import pytest
from logged_run import logged_run
from test_report import log_t

from gbnzoo.report import read_runs, report_rows, write_report

VOID = {"meta", "link", "img", "source", "br"}
LOADING = {"src", "srcset", "data", "poster", "action", "background"}


class Page(HTMLParser):
    """Elements in order, with an error for a tag that closes another one than was open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.words = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data

    def all(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A report in which every part appears."""
    runs = tmp_path_factory.mktemp("runs")
    folders = [logged_run(runs, log_t, rung="sb", seed=seed) for seed in (0, 1)]
    for batch in (8, 16):
        large = {"batch_size": batch, "ghost_batch_size": 4}
        tag = {"tag": "shapes_8"} if batch == 8 else {}  # a ladder has one large batch
        folders += [logged_run(runs, log_t, rung=rung, large=large, **tag) for rung in ("lb", "lr", "gbn")]
    for ghosts in (2, 8):
        large = {"batch_size": 16, "ghost_batch_size": ghosts}
        folders.append(logged_run(runs, log_t, rung="gbn", large=large, tag=f"shapes_g{ghosts}"))
    folders.append(logged_run(runs, log_t, rung="ra", until=500, layers=("stem",)))
    records = read_runs(folders)
    return write_report(records, report_rows(records), tmp_path_factory.mktemp("report") / "page").parent


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "index.html").read_text())


def test_every_part_is_there_and_can_be_jumped_to(page):
    ids = [section["id"] for section in page.all("section")]
    assert ids == ["runs", "ladder", "ghosts", "curves", "distance", "batch_sizes", "layers"]
    assert [link["href"] for link in page.all("a")][: len(ids)] == [f"#{name}" for name in ids]
    assert "500 of 1,000" in page.words
    every_id = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(every_id) == len(set(every_id))


def test_parts_without_data_are_left_out(tmp_path, undrawn):
    records = read_runs([logged_run(tmp_path, log_t, until=3)])
    page = Page(write_report(records, report_rows(records), tmp_path / "page").read_text())
    assert [section["id"] for section in page.all("section")] == ["runs", "curves", "distance"]


def test_the_page_asks_for_nothing_outside_itself(page, folder):
    assert page.all("script") == page.all("iframe") == page.all("form") == []
    for tag, attributes, _ in page.elements:
        for name, value in attributes.items():
            if name in LOADING or (tag == "link" and name == "href"):
                assert value.startswith("data:"), (tag, name, value[:80])
    text = (folder / "index.html").read_text()
    assert not re.search(r"https?://|url\(|@import", text)


def test_every_figure_has_words_its_data_and_both_its_pictures(page, folder):
    figures = page.all("figure")
    assert len(figures) > 8
    images, darks = page.all("img"), page.all("source")
    data = {a["download"]: a["href"] for a in page.all("a") if "download" in a}
    captions = {caption["id"] for caption in page.all("figcaption")}
    assert len(images) == len(darks) == len(figures)
    assert data.keys() == {f"{figure['id'].removeprefix('chart_')}.csv" for figure in figures} | {"fits.csv"}

    def content(uri):
        return base64.b64decode(uri.partition("base64,")[2])

    for figure, image, dark in zip(figures, images, darks, strict=True):
        name = figure["id"].removeprefix("chart_")
        assert len(image["alt"]) > 20
        assert image["aria-describedby"] in captions
        assert content(image["src"]) == (folder / f"{name}.png").read_bytes()
        assert dark["media"] == "(prefers-color-scheme: dark)"
        assert content(dark["srcset"]) == (folder / f"{name}-dark.png").read_bytes()
        assert content(data[f"{name}.csv"]) == (folder / f"{name}.csv").read_bytes()
        assert {f"{name}.csv", f"{name}.png"} <= {a["href"] for a in page.all("a")}


def test_what_a_run_is_called_cannot_become_markup(tmp_path, undrawn):
    records = read_runs([logged_run(tmp_path, log_t, layers=("<script>alert(1)</script>",))])
    page = Page(write_report(records, report_rows(records), tmp_path / "page").read_text())
    assert page.all("script") == []
    assert "<script>alert(1)</script>" in page.words


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """<script>addEventListener("load", () => parent.postMessage([
  innerWidth, document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor,
  [...document.images].filter(i => i.naturalWidth > 0).length,
  [...document.images].filter(i => i.currentSrc === i.parentNode.querySelector("source").srcset).length,
  performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length].join("|"), "*"))</script>"""
# A window is at least 500 pixels wide, a frame as narrow as a phone.
FRAME = """<!doctype html><meta name="color-scheme" content="light dark"><title></title>
<script>addEventListener("message", event => document.title = event.data)</script>
<iframe src="index.html" style="width: WIDTHpx; height: 850px; border: 0"></iframe>"""
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=10000 --window-size=1400,900"
)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium to look at the page with")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "light"), (390, "dark")])
def test_a_browser_shows_all_of_it_at_any_width_and_in_the_dark(folder, page, tmp_path, width, scheme):
    (tmp_path / "index.html").write_text((folder / "index.html").read_text() + MEASURE)
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    dark = scheme == "dark"
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={tmp_path / 'screen.png'}"]
    command += ["--dump-dom", frame.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    shown, needed, background, images, darks, requests = re.search(r"<title>([^<]+)</title>", seen)[1].split("|")
    assert int(shown) == width
    assert int(needed) <= width  # nothing sticks out
    assert background == ("rgb(17, 20, 24)" if dark else "rgb(246, 247, 248)")
    assert int(images) == len(page.all("img"))
    assert int(darks) == (len(page.all("img")) if dark else 0)
    assert int(requests) == 0
    with PIL.Image.open(tmp_path / "screen.png") as screen:
        assert len(screen.convert("RGB").getcolors(2**20)) > 20  # something was painted
