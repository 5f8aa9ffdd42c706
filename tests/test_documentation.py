"""Pages lead where they say: links, pictures and the gallery."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md"), *DOCS.glob("examples/*.md")])


def links(page: Path) -> list[str]:
    """Targets of links and pictures of a page that are files of the repository."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose)]
    return [target for target in found if target and "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    missing = [target for target in links(page) if not (page.parent / target).exists()]
    assert not missing
    assert not re.search(r"!\[\s*\]", page.read_text()), "a picture without words for it"
    assert not re.search(r"^(<{7}|>{7}) ", page.read_text(), re.MULTILINE), "a merge left undone"


def test_every_picture_is_on_a_page_and_every_page_with_pictures_is_in_the_gallery() -> None:
    gallery = DOCS / "gallery.md"
    others = [page for page in PAGES if page != gallery]
    shown = {
        page: {(page.parent / target).resolve() for target in links(page) if target.endswith("png")}
        for page in others
    }
    pictures = {path.resolve() for path in (DOCS / "examples" / "figures").iterdir()}
    assert set().union(*shown.values()) == pictures
    listed = {(gallery.parent / target).resolve() for target in links(gallery)}
    front = {"README", "index", "getting_started"}
    assert {page for page, found in shown.items() if found and page.stem not in front} <= listed


def test_pages_load_nothing_from_other_servers() -> None:
    """Formulas are set by a file that is built with the pages."""
    settings = (DOCS / "conf.py").read_text()
    assert re.search(r'^mathjax_path = "mathjax/\S+\.js"$', settings, re.MULTILINE)
    assert "://" not in settings
