"""The site: Sphinx with furo and MyST-NB; docs/site.md has the command that builds it, and why it is built so."""

from __future__ import annotations

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS / "_site")]
# kernels of notebooks: this checkout's code; no bars; arithmetic that does not fight over the cores
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ["JUPYTER_PATH"] = str(DOCS / "_site/jupyter")  # this interpreter, whatever kernels a user has; quiet
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm would draw its bars by ipywidgets
os.environ["MATPLOTLIBRC"] = str(DOCS / "_site/matplotlibrc")

from depass_fast.version import __version__  # noqa: E402

project = "depass_fast"
author = "depass_fast contributors"
copyright = "depass_fast contributors, Apache-2.0"
version = release = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "outside",  # docs/_site
    "docstrings",
    "commands",
    "llms",
    "links",
]
exclude_patterns = ["_site"]

myst_heading_anchors = 4  # the anchors that GitHub gives to headings
myst_links_external_new_tab = False
nb_execution_mode = os.environ.get("DEPASS_FAST_NOTEBOOKS", "force")  # or "cache", "off"
nb_execution_timeout = 600  # seconds a cell; none takes a minute
nb_execution_show_tb = True  # a cell that fails is a warning, and so an error of the build
nb_merge_streams = True
nb_output_stderr = "warn"  # a warning in a notebook is one of the build
nb_render_markdown_format = "myst"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Formula"]
toc_object_entries_show_parents = "hide"
napoleon_use_ivar = True
default_role = "code"  # single backquotes in docstrings are code

# for .ci/links; GitHub makes the anchors of its pages in the browser, and some sites refuse who is no browser
linkcheck_timeout, linkcheck_retries = 30, 3
linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]
linkcheck_allow_unauthorized = True

html_theme = "furo"
html_title = f"depass_fast {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0b5c8f",
        "color-brand-content": "#0b5c8f",
        "color-api-name": "#0b5c8f",
        "color-api-pre-name": "#5a6570",
    },
    "dark_css_variables": {
        "color-brand-primary": "#7cc4f0",
        "color-brand-content": "#7cc4f0",
        "color-api-name": "#7cc4f0",
        "color-api-pre-name": "#9aa5b1",
    },
    "navigation_with_keys": True,
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"
