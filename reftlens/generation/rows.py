"""The tokens of a generation in progress: prompts padded on the left, and what was written after each of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from reftlens.text.batch import Batch
from reftlens.text.view import TokenRole, TokenView

_COLUMNS = ("tokens", "role", "edited", "turn")
"""Of `Rows`, with a column for each token."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Tokens so far, all rows ending in the same column; `append` adds a column."""

    tokens: Int[Tensor, "row column"]
    role: Int[Tensor, "row column"]
    edited: Bool[Tensor, "row column"]
    """Where an edit acted."""
    done: Bool[Tensor, " row"]
    """Rows that have ended, and get padding where others go on."""
    tokenizer: Any = None
    turn: Int[Tensor, "row column"] | None = None
    """As of the prompts; what is written is of no message."""

    @classmethod
    def of(cls, prompts: Batch, device: torch.device) -> "Rows":
        """The prompts of a batch, without what follows them there.

        Raises:
            ValueError: naming a row without a prompt token.
        """
        ids = [tokens[mask].tolist() for tokens, mask in zip(prompts.tokens, prompts.prompt_mask, strict=True)]
        if not all(ids):
            raise ValueError(f"row {[bool(row) for row in ids].index(False)} has no prompt token to continue")
        longest = max(map(len, ids))
        filling = getattr(prompts.tokenizer, "pad_token_id", None) or 0
        tokens = torch.tensor([[filling] * (longest - len(row)) + row for row in ids], device=device)
        before = torch.arange(longest) < torch.tensor([[longest - len(row)] for row in ids])
        role = torch.where(before, int(TokenRole.PAD), int(TokenRole.PROMPT)).to(device)
        nowhere = torch.zeros_like(role, dtype=torch.bool)
        turn = None
        if prompts.turn is not None:
            marks = prompts.turn[prompts.prompt_mask].to(device)
            turn = torch.zeros_like(tokens).masked_scatter(~before.to(device), marks)
        return cls(tokens, role, nowhere, nowhere[:, 0].clone(), prompts.tokenizer, turn)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def real(self) -> Bool[Tensor, "row column"]:
        """Tokens that are no padding."""
        return self.role != TokenRole.PAD

    @property
    def view(self) -> TokenView:
        """What positions are chosen from."""
        return TokenView(self.tokens, self.role, self.tokenizer, self.turn)

    def take(self, rows: Int[Tensor, " rows"]) -> "Rows":
        """The rows of these numbers, some of them left out or there several times."""
        return replace(self, **self._changed(lambda column: column[rows]), done=self.done[rows])

    def alone(self, row: int) -> "Rows":
        """One row, without its padding."""
        real = self.real[row]
        return replace(self, **self._changed(lambda column: column[row, real][None]), done=self.done[[row]])

    def until(self, stop: int) -> "Rows":
        """The columns before `stop`."""
        return replace(self, **self._changed(lambda column: column[:, :stop]))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What has a column for each token, all of it changed alike."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        return {name: change(column) for name, column in columns.items() if column is not None}

    def append(self, tokens: Int[Tensor, " row"], stops: Int[Tensor, " _"]) -> "Rows":
        """With one more token in every row that is not done; one of `stops` ends its row."""
        going = ~self.done
        tokens = torch.where(going, tokens, self.tokens[0, 0])
        role = torch.where(going, int(TokenRole.GENERATED), int(TokenRole.PAD)).to(self.role)
        wider = self._changed(lambda column: pad(column, (0, 1)))
        wider["tokens"][:, -1], wider["role"][:, -1] = tokens, role
        return replace(self, **wider, done=self.done | torch.isin(tokens, stops))

    @staticmethod
    def join(parts: "Sequence[Rows]") -> "Rows":
        """All rows of several, in one; those that are shorter end in padding."""
        width = max(part.tokens.shape[1] for part in parts)  # padding has id 0, role 0 and no edit
        wide = [part._changed(lambda column: pad(column, (0, width - column.shape[1]))) for part in parts]
        columns = {name: torch.cat([part[name] for part in wide]) for name in wide[0]}
        return replace(parts[0], **columns, done=torch.cat([part.done for part in parts]))

    def prompt_ids(self, row: int) -> tuple[int, ...]:
        """Tokens of the prompt."""
        return tuple(self.tokens[row, self.role[row] == TokenRole.PROMPT].tolist())

    def ids(self, row: int) -> tuple[int, ...]:
        """Tokens that were written."""
        return tuple(self.tokens[row, self.role[row] == TokenRole.GENERATED].tolist())

    def marks(self, row: int) -> tuple[bool, ...]:
        """Which tokens were edited, of the prompt and of what was written."""
        return tuple(self.edited[row, self.real[row]].tolist())
