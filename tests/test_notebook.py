"""The notebook in docs/ runs, and shows what it shows. `python -m tests.test_notebook` writes what it shows anew."""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "analyse.ipynb"


def executed():
    """The notebook after all its cells have run, with this Python, in its own folder."""
    import nbformat
    from nbclient import NotebookClient

    os.environ["PYTHONPATH"] = str(ROOT)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(NOTEBOOK.parent)}})
    client.create_kernel_manager()
    return client.execute()


def shown(notebook: dict) -> dict[str, list[str]]:
    """By cell, what it shows as text; of what is measured here, nothing that another machine would show."""
    return {
        cell["id"]: ["".join(output.get("data", {}).get("text/plain", "")) for output in cell["outputs"]]
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and "measured" not in cell["metadata"].get("tags", [])
    }


@pytest.mark.slow
def test_the_notebook_shows_what_it_would_show_today(monkeypatch):
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason=f"{package} is not installed (the extra notebook)")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stored = json.loads(NOTEBOOK.read_text())
    assert shown(executed()) == shown(stored), "python -m tests.test_notebook would renew it"


if __name__ == "__main__":
    found = executed()
    for cell in found.cells:
        cell.metadata.pop("execution", None)
        cell.get("outputs", [])[:] = [output for output in cell.get("outputs", []) if output.output_type != "stream"]
    NOTEBOOK.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
