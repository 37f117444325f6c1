"""Notebooks run from top to bottom, at a small setting, into a scratch folder; the committed ones keep outputs.

A notebook names its small setting in its metadata, `reftlens.small`: Python that replaces the cell tagged
`parameters`.
"""

from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_committed_notebook_has_outputs_and_no_errors(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    outputs = [output for cell in code for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type == "error"]
    assert notebook.metadata["reftlens"]["small"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_at_its_small_setting(path, tmp_path):
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    parameters.source = notebook.metadata["reftlens"]["small"]
    (tmp_path / "data").symlink_to(path.parents[1] / "data")
    scratch = tmp_path / "notebooks"
    scratch.mkdir()
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(scratch)}}).execute()
    nbformat.write(notebook, scratch / path.name)
