"""Configuration of the documentation. Build it with ``make docs``: warnings are errors."""

from icexport.cli import train
from icexport.cli.main import app
from icexport.host.versions import __version__

app.rich_markup_mode = train.app.rich_markup_mode = "rich"  # the directive draws with rich, which --help does without

project = "icexport"
author = "the icexport authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.typer"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"icexport {version}"
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # the docstrings say shapes and ranges, which types do not
autodoc_member_order = "bysource"
napoleon_use_ivar = True
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository, which are no pages
