"""Sphinx configuration: ``make docs`` builds the site from the Markdown pages in this directory."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).parents[1]

project = "megatron_mosa"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_theme_options = {"page_width": "1100px", "sidebar_width": "240px", "fixed_sidebar": True}
exclude_patterns = ["measurements/*.log"]
myst_heading_anchors = 4
autodoc_typehints = "signature"
autodoc_member_order = "bysource"


def _link_out_of_the_site(app: Sphinx, document: str, source: list[str]) -> None:
    """Replace links to files outside docs/ by their names, and warn about files that do not exist."""

    def name(link: re.Match[str]) -> str:
        path = (Path(app.srcdir) / document).parent / link["path"]
        if not path.exists():
            logging.getLogger(__name__).warning("link to %s: no such file", link["path"], location=document)
        return f"{link['text']} (`{path.resolve().relative_to(ROOT)}`)"

    source[0] = re.sub(r"\[(?P<text>[^]]*)\]\((?P<path>(?:\.\./)+[^)#]*)\)", name, source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", _link_out_of_the_site)
