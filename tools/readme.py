"Write README.md from nbs/index.ipynb with nbconvert (nbdev's own command wants Quarto)"

import os
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]


def readme_text() -> str:
    "README.md as the notebook has it now"
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.cells = [c for c in notebook.cells if not re.match(r"#\|\s*hide\b", c.source)]
    for cell in notebook.cells:
        if re.search(
            r"^#\|\s*echo:\s*false", cell.source, flags=re.MULTILINE
        ):  # what it shows, not how
            cell.metadata["transient"] = {"remove_source": True}
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)
    body, _ = MarkdownExporter().from_notebook_node(notebook)
    body = re.sub(
        r"(\]\()(?![a-z]+:|#)([^)\s]+)(\))",
        lambda m: m[1] + os.path.normpath(f"nbs/{m[2]}") + m[3],
        body,
    )
    note = "<!-- written by tools/readme.py from nbs/index.ipynb: edit the notebook -->\n\n"
    return note + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def write_readme() -> None:
    "README.md, where the notebook exists"
    if (ROOT / "nbs" / "index.ipynb").exists():
        (ROOT / "README.md").write_text(readme_text(), encoding="utf-8")


if __name__ == "__main__":
    write_readme()
