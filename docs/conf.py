"""Sphinx configuration. The package must be installed; nothing is fetched from the network."""

from __future__ import annotations

from typing import Any

from sphinx.application import Sphinx

import itm_kernels

project = "itm_kernels"
author = "the itm_kernels authors"
release = itm_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3  # links to headings, as [text](page.md#heading)

napoleon_google_docstring = False
napoleon_use_rtype = False  # the types under "Returns" stand on the line of their description
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
default_role = "code"  # docstrings of the pipeline write names in single backquotes

html_theme = "furo"
html_title = f"itm_kernels {release}"
html_show_sphinx = False
html_show_copyright = False


def setup(app: Sphinx) -> None:
    """Keep napoleon away from the help under a field, where it takes "Default: 3" for a type and its description."""
    written: dict[str, list[str]] = {}

    def remember(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
        if what == "attribute":
            written[name] = list(lines)

    def restore(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
        if what == "attribute":
            lines[:] = written[name]

    app.connect("autodoc-process-docstring", remember, priority=100)  # before napoleon, whose priority is 500
    app.connect("autodoc-process-docstring", restore, priority=900)
