"""One HTML page that needs nothing beside it: its pictures and their data are inside, and lie beside it as files too.

No script, no font and no style from elsewhere: opened without a network it is the same page.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from gbnzoo.charts import DARK, DPI, LIGHT, Chart


@dataclass(frozen=True)
class Table:
    """A table of text; columns of numbers stand to the right.

    Args:
        caption: above it.
        columns: their names.
        rows: cells.
        name: stem of the file of its data, where there is one.
        data: content of that file, CSV with all the digits.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    name: str = ""
    data: str = ""

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers."""
        return tuple(
            all(not row[k] or row[k][0].isdigit() or row[k][0] in "−-–" for row in self.rows)
            for k in range(len(self.columns))
        )

    @property
    def encoded(self) -> str:
        """Its data in base64."""
        return base64.b64encode(self.data.encode()).decode()


@dataclass(frozen=True)
class Section:
    """A part of the page; one that is `folded` opens when it is wanted."""

    id: str
    title: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    folded: bool = False


@dataclass(frozen=True)
class _Picture:
    """A chart as the page has it."""

    chart: Chart
    light: str  # base64
    dark: str
    csv: str
    width: int  # pixels of the layout, of which the PNG has more
    height: int


def write_page(folder: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Write `index.html`, `NAME.png`, `NAME-dark.png` and `NAME.csv` of each chart, `NAME.csv` of tables; returns the page.

    Files of the folder that are not of this page are left alone.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {chart.name: _picture(chart, folder) for section in sections for chart in section.charts}
    for table in (table for section in sections for table in section.tables if table.name):
        (folder / f"{table.name}.csv").write_text(table.data, encoding="utf-8")
    environment = Environment(
        loader=PackageLoader("gbnzoo", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(title=title, sections=sections, pictures=pictures)
    path = folder / "index.html"
    path.write_text(page, encoding="utf-8")
    return path


def _picture(chart: Chart, folder: Path) -> _Picture:
    data = chart.csv().encode()
    (folder / f"{chart.name}.csv").write_bytes(data)
    encoded = {}
    for theme, ending in ((LIGHT, ".png"), (DARK, "-dark.png")):
        content = chart.png(theme)
        (folder / f"{chart.name}{ending}").write_bytes(content)
        encoded[theme.name] = base64.b64encode(content).decode()
    # A PNG's header: width and height in pixels. The layout shows 96 of its DPI.
    width, height = (int.from_bytes(content[at : at + 4]) * 96 // DPI for at in (16, 20))
    return _Picture(chart, **encoded, csv=base64.b64encode(data).decode(), width=width, height=height)
