"""The shape of the package, read from its source: who may import whom, and what no file may do."""

import ast
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1] / "reftlens"

# A word imports only words to its left. Words that stand side by side between two bars do not import each other, but
# those of the first and of the analyses, which follow the order they are written in. A word is a file at the top of the
# package, a folder, or a folder of `analysis`; within a folder, imports go as the files need them.
ORDER = (
    "errors, files, figures, numbers | bridge | interventions | text | editing | cone | "
    "scoring generation attachment | training | storage | analysis.subspaces, analysis.places, analysis.strength, "
    "analysis.causal | selection | widgets tasks | experiments | reports | __main__ | __init__"
)
PLACES: dict[str, tuple[int, int]] = {
    word: (bar, comma)
    for bar, group in enumerate(ORDER.split("|"))
    for comma, words in enumerate(group.split(","))
    for word in words.split()
}
FILES = sorted(path for path in ROOT.rglob("*.py"))

# `(file, function)`: why it may have **kwargs.
KWARGS_ALLOWED = {
    ("training/fitting.py", "fit"): "fields of FitConfig by name; FitConfig.replace raises for any other",
    ("training/fitting.py", "fit_many"): "fields of FitConfig by name; FitConfig.replace raises for any other",
    ("training/planning.py", "plan"): "fields of FitConfig by name; FitConfig.replace raises for any other",
    ("attachment/generating.py", "__call__"): "stands in the place of generate, and hands on what that was given",
    ("bridge/protocol.py", "__call__"): "the Protocol says how TransformerLens is called, and that is its signature",
    ("cone/stand_ins.py", "forward"): "a module in a block's place takes whatever transformers gives that block",
    ("cone/trim.py", "forward"): "a module in a block's place takes whatever transformers gives that block",
    ("cone/trim.py", "update"): "the signature of transformers' cache layers",
    ("cone/caches.py", "update"): "the signature of transformers' cache layers",
    ("experiments/lm_harness.py", "_model_generate"): "the signature of lm-eval's models",
    ("editing/begun.py", "update"): "the signature of transformers' cache layers",
}
LATE = {"pandas", "matplotlib", "datasets", "peft", "ipywidgets", "accelerate", "gguf"} | {
    "sklearn",
    "scipy",
    "openai",
    "lm_eval",
}
MODELS = {"model", "hf_model", "bridge", "original_model"}
RUNS_MODELS = ("editing/engine.py", "bridge/trial.py", "attachment/donors.py", "experiments/methods/loop.py")
"""The second on a few tokens of its own, before anything else; the third a plain transformers model, on sources; the
last plain models whose weights are trained."""
RUNNERS = {"forward", "generate", "run_with_hooks", "run_with_cache", "__call__"}


def name_of(path):
    """`interventions/base.py` → `interventions.base`, `interventions/__init__.py` → `interventions`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def word_of(module):
    """`cone.body` → `cone`, `analysis.causal.maps` → `analysis.causal`; `analysis` itself holds nothing."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "analysis" else parts[0]


@cache
def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def without_type_checking(tree):
    """Every node but those under `if TYPE_CHECKING:`, which never run."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from without_type_checking(node)


# -- rules: each takes a file name and its tree, and gives `(line, message)` for what it finds -----------------


def imports_of(tree):
    """`(line, module)` for each module of the package that `tree` imports, anywhere in the file."""
    modules = {name_of(path) for path in FILES}
    for node in without_type_checking(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "reftlens":
                    yield node.lineno, alias.name.partition(".")[2] or "__init__"
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield node.lineno, f"a relative import ({ast.unparse(node)})"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "reftlens":
            base = (node.module or "").partition(".")[2]
            for alias in node.names:
                inner = f"{base}.{alias.name}".strip(".")
                yield node.lineno, inner if inner in modules else base or "__init__"


def upward_imports(file, tree):
    module = name_of(ROOT / file)
    for line, imported in imports_of(tree):
        if imported.startswith("a relative import"):
            yield line, f"{imported}: write from reftlens.… import …, so that layers can be read"
        elif (word := word_of(imported)) != word_of(module) and PLACES[word] >= PLACES[word_of(module)]:
            yield line, f"{module} imports {imported}, which is not to its left in the order of words"


def keyword_dictionaries(file, tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and node.args.kwarg is not None:
            name = getattr(node, "name", "<lambda>")
            if (file, name) not in KWARGS_ALLOWED:
                yield node.lineno, f"{name} takes **{node.args.kwarg.arg}: a misspelt argument would pass"


def bare_excepts(file, tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "bare except: name what is expected"


def prints(file, tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "print" and file != "__main__.py":
            yield node.lineno, "print: only __main__.py writes to the screen"


def model_calls(file, tree):
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or file in RUNS_MODELS:
            continue
        called = node.func
        runs = isinstance(called, ast.Attribute) and called.attr in RUNNERS and _is_model(called.value)
        if runs or _is_model(called):
            yield node.lineno, f"{ast.unparse(called)}(…) runs a model: engine.forward is for that"


def _is_model(node):
    return (isinstance(node, ast.Name) and node.id in MODELS) or (
        isinstance(node, ast.Attribute) and node.attr in MODELS
    )


def hooks(file, tree):
    allowed = {
        "add_hook": "editing/engine.py",
        "register_forward_hook": "attachment/blocks.py",
        "register_forward_pre_hook": "attachment/blocks.py",
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (
            (node.attr in allowed and allowed[node.attr] != file) or node.attr in ("reset_hooks", "remove_all_hook_fns")
        ):
            yield node.lineno, f"{ast.unparse(node)}: hooks are added by engine.hooked (and attachment.blocks) alone"


def future_annotations(file, tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            yield node.lineno, "from __future__ import annotations silently switches shape checks off"


def unsafe_loading(file, tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] + [getattr(node, "module", None)]
            for name in {"pickle", "importlib"} & {str(n).split(".")[0] for n in names}:
                if getattr(node, "module", None) != "importlib.metadata":  # reads versions, imports nothing
                    yield node.lineno, f"{name}: nothing is unpickled, and nothing imported by name"
        elif isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), [ast.unparse(k) for k in node.keywords]
            if called in ("eval", "exec", "__import__"):
                yield node.lineno, f"{called}(…) runs text"
            if called == "torch.load" and "weights_only=True" not in given:
                yield node.lineno, "torch.load without weights_only=True unpickles"


def early_imports(file, tree):
    for node in tree.body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name.split(".")[0] in LATE:
                yield node.lineno, f"{name} is imported with the package: import it where it is used"


def reseeding(file, tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.manual_seed" and file != "training/run.py":
            yield node.lineno, "torch.manual_seed changes the user's random numbers: use a torch.Generator"


# Each rule with a source that it must object to, on a file that has no exemption.
RULES = {
    upward_imports: "from reftlens.generation.writing import generate",
    keyword_dictionaries: "def f(a, **settings): pass",
    bare_excepts: "try:\n    f()\nexcept:\n    pass",
    prints: "def f():\n    print('x')",
    model_calls: "def f(self):\n    return self.model(tokens)",
    hooks: "point.add_hook(f)",
    future_annotations: "from __future__ import annotations",
    unsafe_loading: "torch.load(path)",
    early_imports: "import pandas as pd",
    reseeding: "torch.manual_seed(0)",
}
MORE_OFFENCES = [
    (upward_imports, "from reftlens import generate"),
    (upward_imports, "from reftlens import ReFT"),
    (upward_imports, "import reftlens"),
    (upward_imports, "import reftlens.__main__"),
    (upward_imports, "def f():\n    from reftlens.tasks.emoji import run"),
    (upward_imports, "from .engine import forward"),
    (upward_imports, "from reftlens.storage.folder import load"),
    (keyword_dictionaries, "f = lambda **k: k"),
    (keyword_dictionaries, "class A:\n    async def __call__(self, **kwargs): pass"),
    (model_calls, "logits = model(tokens)"),
    (model_calls, "hf_model.generate(tokens)"),
    (model_calls, "model.original_model(tokens)"),
    (model_calls, "session.model.run_with_hooks(tokens)"),
    (hooks, "block.register_forward_hook(f)"),
    (hooks, "model.reset_hooks()"),
    (unsafe_loading, "import pickle"),
    (unsafe_loading, "from importlib import import_module"),
    (unsafe_loading, "torch.load(path, weights_only=False)"),
    (unsafe_loading, "eval(text)"),
    (early_imports, "from matplotlib import pyplot"),
]
INNOCENT = """
from importlib.metadata import version
from typing import TYPE_CHECKING
import torch
from reftlens.bridge.protocol import Bridge
from reftlens.interventions import LoReFT
if TYPE_CHECKING:
    import pandas
    from reftlens.generation.session import Session
def f(*args, a=1):
    import pandas
    try:
        return g(**settings, model=model), forward(model, tokens), torch.load(path, weights_only=True)
    except ValueError:
        return model.hook_dict, model.eval(), generator.manual_seed(0)
"""


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_file_of_the_package_breaks_the_rule(rule):
    found = [
        f"reftlens/{path.relative_to(ROOT)}:{line}: {message}"
        for path in FILES
        for line, message in rule(str(path.relative_to(ROOT)), parsed(path))
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "source"), [*RULES.items(), *MORE_OFFENCES], ids=lambda v: v.__name__ if callable(v) else ascii(v)
)
def test_each_rule_objects_to_what_it_forbids(rule, source):
    assert list(rule("editing/reft.py", ast.parse(source)))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_rule_objects_to_what_is_allowed(rule):
    assert not list(rule("editing/reft.py", ast.parse(INNOCENT)))


def test_what_is_exempt_is_really_there():
    """Exemptions that nobody needs any more are taken back."""
    for file in RUNS_MODELS:
        assert any(_is_model(n.func) for n in ast.walk(parsed(ROOT / file)) if isinstance(n, ast.Call))
    for file, function in KWARGS_ALLOWED:
        tree = parsed(ROOT / file)
        assert any(getattr(n, "name", "") == function and n.args.kwarg for n in ast.walk(tree) if hasattr(n, "args"))


def test_the_order_names_every_word_and_no_other():
    words = {word_of(name_of(path)) for path in FILES} - {"analysis"}
    missing, gone = sorted(words - PLACES.keys()), sorted(PLACES.keys() - words)
    assert not missing, f"give {', '.join(missing)} a place in ORDER, as far left as its imports let it stand"
    assert not gone, f"{', '.join(gone)} is in ORDER and no longer in the package"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("scoring/evaluation.py", "from reftlens.generation.session import Session"),
        ("generation/session.py", "from reftlens.scoring.evaluation import evaluate"),
        ("tasks/emoji.py", "from reftlens.widgets.grid import grid"),
        ("analysis/places/effects.py", "from reftlens.analysis.causal.scores import scores"),
        ("figures.py", "from reftlens.bridge.protocol import Bridge"),
        ("errors.py", "from reftlens.figures import use"),
    ],
)
def test_words_side_by_side_do_not_import_each_other(file, source):
    assert list(upward_imports(file, ast.parse(source)))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("analysis/causal/scores.py", "from reftlens.analysis.places.measuring import effects"),
        ("tasks/emoji.py", "from reftlens.tasks.task import Task"),
        ("cone/scorer.py", "from reftlens.cone.full import Full"),
        ("__main__.py", "from reftlens import figures"),
    ],
)
def test_words_to_the_left_and_files_of_the_same_folder_may_be_imported(file, source):
    assert not list(upward_imports(file, ast.parse(source)))


def test_no_complaint_of_a_checker_is_silenced_without_a_rule():
    """Pyright passes without a single ignore; ruff's exceptions name the rule they are for."""
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            assert "type: ignore" not in line and "pyright: ignore" not in line, f"{path.name}:{number}: {line.strip()}"
            assert "noqa" not in line or "# noqa: " in line, f"{path.name}:{number}: noqa without a rule"


def test_every_module_says_what_it_is():
    silent = [str(path.relative_to(ROOT)) for path in FILES if not ast.get_docstring(parsed(path))]
    assert not silent, f"no docstring: {', '.join(silent)}"


# -- sizes ---------------------------------------------------------------------------------------------------

MOST_LINES, MOST_STATEMENTS = 250, 30


def body_lines(function):
    """Lines of a function's body, its docstring not counted."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def long_functions(tree):
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f"{n.name} {body_lines(n)}" for n in functions if body_lines(n) > MOST_STATEMENTS]


def test_files_and_functions_are_short():
    files = {str(p.relative_to(ROOT)): len(p.read_text(encoding="utf-8").splitlines()) for p in FILES}
    assert not {name: lines for name, lines in files.items() if lines > MOST_LINES}
    functions = {str(p.relative_to(ROOT)): long_functions(parsed(p)) for p in FILES}
    assert not {name: long for name, long in functions.items() if long}


def test_a_docstring_does_not_make_a_function_long():
    statements = "\n".join("    x = 1" for _ in range(MOST_STATEMENTS))
    assert not long_functions(ast.parse(f'def f():\n    """{"a line" + chr(10) * 50}"""\n{statements}'))
    assert long_functions(ast.parse(f"def f():\n{statements}\n    return x"))


# -- the public names ----------------------------------------------------------------------------------------


def public():
    import reftlens

    return {name: getattr(reftlens, name) for name in reftlens.__all__}


def test_the_list_of_public_names_is_sorted_and_holds_all_that_is_imported():
    import reftlens

    assert list(reftlens.__all__) == sorted(set(reftlens.__all__), key=lambda name: (not name.isupper(), name))
    imported = [
        a.asname or a.name for n in parsed(ROOT / "__init__.py").body if isinstance(n, ast.ImportFrom) for a in n.names
    ]
    assert sorted(imported) == sorted(reftlens.__all__)


def test_every_public_name_has_a_docstring_of_its_own():
    for name, value in public().items():
        doc = value.__doc__
        assert doc and doc.strip(), f"{name} has no docstring"
        assert not doc.startswith(f"{name}("), f"{name} has only the signature that dataclass writes"
        bases = value.__mro__[1:] if isinstance(value, type) else ()
        assert all(doc != base.__doc__ for base in bases), f"{name} has the docstring of its base class"


def test_no_public_name_hides_a_module_and_namespaces_are_modules():
    import reftlens

    for path in FILES:
        owner = reftlens
        for part in name_of(path).split(".") if path.name not in ("__init__.py", "__main__.py") else ():
            owner = getattr(owner, part, None)  # a module that nobody imported yet is not hidden
            if owner is None:
                break
        assert owner is None or isinstance(owner, ModuleType), f"{name_of(path)} is hidden by {owner!r}"
    namespaces = [name for name, value in public().items() if isinstance(value, ModuleType)]
    assert len(namespaces) <= 14 and len(reftlens.__all__) <= 60
    for name in namespaces:
        for inner in getattr(getattr(reftlens, name), "__all__", ()):
            assert getattr(getattr(reftlens, name), inner).__doc__, f"{name}.{inner} has no docstring"
