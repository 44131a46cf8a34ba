"""How Sphinx makes the documentation: `make docs`."""

import fusedstep

project = "fusedstep"
author = "The fusedstep developers"
release = version = fusedstep.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_heading_anchors = 3

# Every public name of a module, in the order of the source.
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"fusedstep {release}"
