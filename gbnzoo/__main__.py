"""`python -m gbnzoo` is `gbnzoo`."""

from gbnzoo.cli import app

app(prog_name="gbnzoo")
