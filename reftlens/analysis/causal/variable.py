"""One variable of an exchange that may have several: its own columns, its own pairs."""

from collections.abc import Hashable, Sequence
from dataclasses import replace

from jaxtyping import Bool, Float
from torch import Tensor

from reftlens.editing.reft import ReFT
from reftlens.editing.site import Site
from reftlens.interventions.base import Intervention
from reftlens.interventions.gates import Gated
from reftlens.interventions.interchange import DAS
from reftlens.interventions.masks import GatedExchange
from reftlens.interventions.subspace import orthonormal
from reftlens.text.batch import Batch


def about_variable(reft: ReFT, variable: str | None) -> ReFT:
    """The exchange of one variable, under the name `"source"`; sites whose gates are all shut are left out.

    Raises:
        ValueError: for what is no exchange in a subspace, no variable where there are several, or no open gate at all.
    """
    modules: dict[Site, Intervention] = {}
    shut: list[GatedExchange] = []
    for site, module in reft.items():
        if not module.variables:
            raise ValueError(f"{module.kind} at {site} exchanges nothing: give DAS or one of its kin")
        if variable is None and len(module.variables) > 1:
            raise ValueError(f"{module.kind} exchanges {', '.join(module.variables)}: say which with variable=…")
        if isinstance(module, DAS):
            basis = module.subspace(variable or next(iter(module.variables))).detach()
            modules[site] = DAS(module.d, basis=orthonormal(basis))
        elif isinstance(module, GatedExchange) and not module.learned_rank:
            shut.append(module)
        else:
            basis_of(module)
            modules[site] = module
    if not modules:
        shut[0].as_das()  # says so
    return ReFT(modules)


def pairs_of(data: Batch, variable: str | None) -> Batch:
    """The rows in which the variable is exchanged, its source named `"source"`."""
    if not data.sources:
        raise ValueError("the pairs have no source: pass data.with_sources(…)")
    name = variable or next(iter(data.sources))
    if name not in data.sources or (variable is None and len(data.sources) > 1):
        raise ValueError(f"the pairs have sources for {', '.join(data.sources)}: say which with variable=…")
    pairs = data[_exchanging(data, name)]
    if not len(pairs):
        raise ValueError(f"no pair exchanges {name!r}")
    return replace(pairs, sources={"source": pairs.sources[name]})


def rows_of(base: Batch, test: Batch, variable: str | None) -> Batch:
    """The rows of `base` that `pairs_of` keeps of `test`."""
    check_same_prompts(test, base)
    return replace(base, sources={})[_exchanging(test, variable)]


def values_of(values: Sequence[Hashable], train: Batch, variable: str | None) -> list[Hashable]:
    """Of the values of all rows of `train` those of the rows that `pairs_of` keeps."""
    if len(values) != len(train):
        raise ValueError(f"values has {len(values)} entries, and the training data {len(train)} rows")
    return [value for value, kept in zip(values, _exchanging(train, variable).tolist(), strict=True) if kept]


def _exchanging(data: Batch, variable: str | None) -> Bool[Tensor, " pair"]:
    """The rows in which the variable is exchanged, of several that one."""
    return data.sources[variable or next(iter(data.sources))].rows >= 0


def check_same_prompts(data: Batch, base: Batch, name: str = "base") -> None:
    """Raise `ValueError` where `base`, or what it is called, has other rows than `data`, or is scored otherwise."""
    if base.answers != data.answers:
        theirs, mine = (batch.among.strip() or "among all tokens" for batch in (base, data))
        raise ValueError(
            f"{name} is scored {theirs}, and the data {mine}: both.among_answers([…]) with the same labels"
        )
    if len(base) != len(data):
        raise ValueError(f"{name} has {len(base)} row(s), and the data {len(data)}")
    for row in range(len(data)):
        theirs, mine = (batch.tokens[row][batch.prompt_mask[row]].tolist() for batch in (base, data))
        if theirs != mine:
            shown = [batch.examples[row].prompt or ids for batch, ids in ((base, theirs), (data, mine))]
            raise ValueError(f"row {row}: {name} has the prompt {shown[0]!r}, and the data {shown[1]!r}")


def basis_of(module: Intervention) -> Float[Tensor, "d rank"]:
    """Orthonormal columns of the subspace that is exchanged: of a gated exchange, those that are open."""
    if isinstance(module, Gated):
        return basis_of(module.inner)
    if isinstance(module, GatedExchange):
        return module.as_das().basis().detach()
    basis = module.basis()
    if basis is None:
        raise ValueError(f"{module.kind} has no subspace to compare with others: it exchanges whole vectors")
    return orthonormal(basis.detach())


def movement_of(module: Intervention) -> Float[Tensor, "d columns"]:
    """`M` such that the exchange moves `h` by `‖(source - h) M‖`: the basis, each column times its gate."""
    if isinstance(module, Gated):
        return movement_of(module.inner)
    if not isinstance(module, GatedExchange):
        return basis_of(module)
    basis, gate = module.basis(), module.gate().detach()
    return gate.diag() if basis is None else basis.detach() * gate
