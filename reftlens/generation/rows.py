"""The tokens of a generation in progress: prompts padded on the left, and what was written after each of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.functional import pad

from reftlens.text.batch import Batch
from reftlens.text.view import TokenRole, TokenView


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
        return cls(tokens, role, nowhere, nowhere[:, 0].clone(), prompts.tokenizer)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def real(self) -> Bool[Tensor, "row column"]:
        """Tokens that are no padding."""
        return self.role != TokenRole.PAD

    @property
    def view(self) -> TokenView:
        """What positions are chosen from."""
        return TokenView(self.tokens, self.role, self.tokenizer)

    def take(self, rows: Int[Tensor, " rows"]) -> "Rows":
        """The rows of these numbers, some of them left out or there several times."""
        return replace(self, **{name: getattr(self, name)[rows] for name in ("tokens", "role", "edited", "done")})

    def alone(self, row: int) -> "Rows":
        """One row, without its padding."""
        real = self.real[row]
        columns = {name: getattr(self, name)[row, real][None] for name in ("tokens", "role", "edited")}
        return replace(self, **columns, done=self.done[[row]])

    def until(self, stop: int) -> "Rows":
        """The columns before `stop`."""
        return replace(self, **{name: getattr(self, name)[:, :stop] for name in ("tokens", "role", "edited")})

    def append(self, tokens: Int[Tensor, " row"], stops: Int[Tensor, " _"]) -> "Rows":
        """With one more token in every row that is not done; one of `stops` ends its row."""
        going = ~self.done
        tokens = torch.where(going, tokens, self.tokens[0, 0])
        role = torch.where(going, int(TokenRole.GENERATED), int(TokenRole.PAD)).to(self.role)
        columns = {"tokens": tokens, "role": role, "edited": torch.zeros_like(going)}
        wider = {name: torch.cat([getattr(self, name), column[:, None]], dim=1) for name, column in columns.items()}
        return replace(self, **wider, done=self.done | torch.isin(tokens, stops))

    @staticmethod
    def join(parts: "Sequence[Rows]") -> "Rows":
        """All rows of several, in one; those that are shorter end in padding."""
        width = max(part.tokens.shape[1] for part in parts)

        def joined(name: str, filling: int) -> Tensor:
            columns = [getattr(part, name) for part in parts]
            return torch.cat([pad(column, (0, width - column.shape[1]), value=filling) for column in columns])

        columns = {
            "tokens": joined("tokens", 0),
            "role": joined("role", int(TokenRole.PAD)),
            "edited": joined("edited", 0),
        }
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
