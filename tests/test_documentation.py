"""Pages lead where they say: links, pictures and the gallery."""

import importlib
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


def test_every_row_of_the_systems_table_leads_somewhere() -> None:
    """An article, a public name of the package, a page that speaks of it, and a test file that does."""
    table = (DOCS / "index.md").read_text().split("## Systems this package holds")[1]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert rows[0] == ["system", "article", "name", "page", "test"] and len(rows) > 40
    for system, article, name, page, test in rows[1:]:
        arxiv = re.fullmatch(r"\[arXiv (\S+)\]\(https://arxiv\.org/abs/\1\)", article)
        assert arxiv or re.fullmatch(r"\[doi (\S+)\]\(https://doi\.org/\1\)", article), system
        role = re.fullmatch(r"\{py:obj\}`pyro_diffusion\.(\w+)\.(\w+)`", name)
        assert role, system
        module = importlib.import_module(f"pyro_diffusion.{role[1]}")
        assert role[2] in module.__all__, system
        target = re.fullmatch(r"\[[^]]+\]\((\S+\.md)\)", page)
        assert target and role[2] in (DOCS / target[1]).read_text(), (system, page)
        path = re.fullmatch(r"`(tests/\S+\.py)`", test)
        assert path and role[2] in (ROOT / path[1]).read_text(), (system, test)
