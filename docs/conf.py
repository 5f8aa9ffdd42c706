"""Sphinx configuration. The build is strict: `make docs` turns every warning into an error."""

import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.fileutil import copy_asset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_diffusion import __version__

project = "pyro_diffusion"
author = "The pyro_diffusion authors"
copyright = author
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True

html_theme = "furo"
html_title = f"pyro_diffusion {release}"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["gallery.css"]

# One file with everything that TeX needs, fonts too. Its menu would load parts that are not shipped.
mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
# Methods without a docstring of their own would otherwise bring torch's, with its references.
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 90
copybutton_prompt_text = ">>> |... "
copybutton_prompt_is_regexp = True

# Names of other projects, whose inventories are not fetched: the build works offline. A reference
# to anything of this package that does not exist still fails.
nitpick_ignore_regex = [
    (
        r"py:(class|func|meth|attr|data|exc|obj|mod)",
        r"(abc|contextlib|enum|torch|torchsde|pyro|numpy|pandas|arviz|xarray|matplotlib|collections\.abc|pathlib|os)\..+",
    ),
    # Parts of annotations and bases that are not for users, an error of Pyro's in "Raises", and one half of
    # an annotation that napoleon cuts at its comma.
    (
        r"py:(class|exc)",
        r"pyro_diffusion\..+\.("
        r"\w*Coefficients|Analysis|C|CachedModule|Rates|ConditionalFilter|Conditioning|Filter|"
        r"GaussianSDE|LinearizedDenoiser|LinearizedLikelihood|Method|NoClosedForms|Node|NoiseHead|"
        r"NoiseSource|Observations|ParticleFilter|Endpoint|PreciseModule|ScheduleLike|Solved|"
        r"Recorded|Sources|TwoEndedSchedule|GuideChart|HierarchicalFlow|SimulatedLevels|SimulatedSite|Stage"
        r")|SMCFailed|dict\[int",
    ),
]


def resolve_defining_module(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.TextElement
) -> nodes.reference | None:
    """Link `pyro_diffusion.a.b.Name`, where annotations find it, to `pyro_diffusion.a.Name`.

    Classes are documented under the package that exports them, which is how they are imported.
    """
    target = str(node.get("reftarget", ""))
    if node.get("refdomain") != "py" or not target.startswith("pyro_diffusion."):
        return None
    package = ".".join(target.split(".")[:2])
    domain: Any = env.get_domain("py")
    # `Name`, then `Class.member`: the longest documented tail under the same subpackage.
    parts = target.split(".")[2:]
    for start in range(1, len(parts)):
        alias = ".".join([package, *parts[start:]])
        if alias in domain.objects:
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, node["reftype"], alias, node, contnode
            )
    return None


def show_public_bases(app: Sphinx, name: str, obj: type, options: Any, bases: list[Any]) -> None:
    """Under "Bases", name the nearest public ancestor in place of a private class."""
    for i, base in enumerate(bases):
        if isinstance(base, type) and base.__name__.startswith("_"):
            bases[i] = next(c for c in base.__mro__ if not c.__name__.startswith("_"))


def ship_mathjax(app: Sphinx) -> None:
    """MathJax and its licence beside the pages, from the package that holds it."""
    source = files("mathjax") / "static" / "mathjax"
    for name in ("LICENSE", "es5/tex-svg.js"):
        copy_asset(str(source / name), Path(app.outdir) / "_static" / "mathjax")


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", ship_mathjax)
    app.connect("autodoc-process-bases", show_public_bases)
    app.connect("missing-reference", resolve_defining_module)
