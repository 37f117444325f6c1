"""Beam search over a generation session: the beams of a prompt are rows of one batch that change places."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reftlens.generation.rows import Rows
from reftlens.generation.session import Session


@dataclass
class _Hypotheses:
    """The best `size` ended hypotheses of one prompt: score per token, and the row that holds it."""

    size: int
    best: list[tuple[float, Rows]] = field(default_factory=list)
    complete: bool = False
    """Whether no beam that still runs can be better."""

    def add(self, score: float, row: Rows) -> None:
        self.best.append((score, row))
        self.best.sort(key=lambda hypothesis: hypothesis[0], reverse=True)
        del self.best[self.size :]

    def compare(self, best_running: float) -> None:
        self.complete |= len(self.best) == self.size and self.best[-1][0] >= best_running


class _Search:
    """The beams of every prompt, as `beams` rows of the session that stand side by side."""

    def __init__(self, session: Session) -> None:
        self.session, self.beams, prompts = session, session.decoding.beams, len(session.rows)
        self.stops = set(session.stops.tolist())
        self.hypotheses = [_Hypotheses(self.beams) for _ in range(prompts)]
        self.scores = torch.full(
            (prompts, self.beams), -torch.inf, dtype=torch.float32, device=session.rows.tokens.device
        )
        self.scores[:, 0] = 0.0  # all beams are equal at first: let one of them speak

    def step(self, logits: Float[Tensor, "row vocab"]) -> None:
        """Every beam becomes one of the best continuations of its prompt's beams."""
        session = self.session
        logprobs = session.scores(logits.log_softmax(dim=-1))
        total = (self.scores.flatten()[:, None] + logprobs).view(len(self.hypotheses), -1)
        scores, places = total.topk(max(2, 1 + len(self.stops)) * self.beams, dim=1)
        running = []
        for prompt, (row_scores, row_places) in enumerate(zip(scores.tolist(), places.tolist(), strict=True)):
            candidates = [
                (score, prompt * self.beams + place // logprobs.shape[-1], place % logprobs.shape[-1])
                for score, place in zip(row_scores, row_places, strict=True)
            ]
            self._end(prompt, candidates[: self.beams])
            running += [candidate for candidate in candidates if candidate[2] not in self.stops][: self.beams]
        self.scores = scores.new_tensor([score for score, _, _ in running]).view(-1, self.beams)
        session.take(places.new_tensor([row for _, row, _ in running]))
        session.append(places.new_tensor([token for _, _, token in running]))
        for hypotheses, score in zip(self.hypotheses, self.scores[:, 0].tolist(), strict=True):
            hypotheses.compare(score / session.length)

    def _end(self, prompt: int, candidates: list[tuple[float, int, int]]) -> None:
        """Put those of the best continuations that end with a stop token among the hypotheses."""
        rows, length = self.session.rows, self.session.length + 1
        for score, row, token in candidates:
            if token in self.stops and not self.hypotheses[prompt].complete:
                ended = rows.take(rows.tokens.new_tensor([row])).append(
                    rows.tokens.new_tensor([token]), self.session.stops
                )
                self.hypotheses[prompt].add(score / length, ended)

    def best(self) -> Rows:
        """The best hypothesis of each prompt; beams that still run count where a prompt is not complete."""
        rows = self.session.rows
        for prompt, hypotheses in enumerate(self.hypotheses):
            for beam, score in enumerate([] if hypotheses.complete else self.scores[prompt].tolist()):
                row = rows.tokens.new_tensor([prompt * self.beams + beam])
                hypotheses.add(score / self.session.length, rows.take(row))
        return Rows.join([hypotheses.best[0][1] for hypotheses in self.hypotheses])


def beam_search(session: Session, bar: Any) -> Rows:
    """The best hypothesis of each prompt: highest mean log-probability per token.

    At each step the best continuations of a prompt's beams are looked at, enough of them that `beams` do not end;
    those that end with a stop token and rank among the first `beams` are finished, the best others run on. A prompt
    is done when `beams` hypotheses have finished and no running beam scores higher.
    """
    search = _Search(session)
    logits = session.next_logits().repeat_interleave(search.beams, dim=0)
    session.take(torch.arange(len(session.rows), device=logits.device).repeat_interleave(search.beams))
    while True:
        search.step(logits)
        bar.update()
        if all(hypotheses.complete for hypotheses in search.hypotheses) or session.finished:
            return search.best()
        logits = session.next_logits()
