"""Notebooks run from top to bottom into a scratch folder, and the committed ones keep their outputs.

A notebook names two small settings in its metadata, Python that replaces the cell tagged `parameters`: `reftlens.tiny`
for a stand-in of 30 thin layers, in this process; `reftlens.small` for the model itself, in a kernel (slow).
"""

import ast
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import stand_in

LONG = ("01", "02", "04", "05", "06", "07", "08")
"""The slow job runs them with the model; what they call, the fast tests call, too."""
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture
def scratch(tmp_path):
    """A folder for a notebook, with the data and the pages beside it."""
    for name in ("data", "docs"):
        (tmp_path / name).symlink_to(NOTEBOOKS[0].parents[1] / name)
    folder = tmp_path / "notebooks"
    folder.mkdir()
    return folder


def at_setting(path, setting):
    """A notebook with its parameters replaced."""
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = notebook.metadata["reftlens"][setting]
    return notebook


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
    assert notebook.metadata["reftlens"]["small"] and notebook.metadata["reftlens"]["tiny"]


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem[:2] not in LONG], ids=lambda p: p.stem)
def test_a_notebook_runs_on_a_stand_in_for_the_model(path, scratch, monkeypatch, request):
    """Every cell, the last value of each written out as a notebook shows it."""
    import matplotlib.pyplot as plt
    from transformers.utils import logging

    import reftlens as rl
    from reftlens.tasks import emoji

    monkeypatch.setattr(rl, "load_model", lambda *, progress: stand_in.model())
    request.addfinalizer(logging.enable_progress_bar)  # one notebook shuts it off, for the whole process
    monkeypatch.setattr(emoji, "DECODING", replace(emoji.DECODING, max_new_tokens=4))
    monkeypatch.chdir(scratch)
    names = {"__name__": "notebook"}
    for cell in at_setting(path, "tiny").cells:
        if cell.cell_type == "code":
            value = run_cell(cell.source, names)
            assert (getattr(value, "_repr_html_", None) or value.__repr__)()
    plt.close("all")


def run_cell(source, names):
    """Run a cell; the value of its last line."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)


@pytest.mark.slow
@pytest.mark.parametrize("path", [pytest.param(p, marks=pytest.mark.xdist_group(p.stem), id=p.stem) for p in NOTEBOOKS])
def test_a_notebook_runs_at_its_small_setting(path, scratch):
    from nbclient import NotebookClient

    notebook = at_setting(path, "small")
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(scratch)}}).execute()
