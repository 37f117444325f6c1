"""Beam search over a generation session: the beams of a prompt are rows of one batch that change places."""

from dataclasses import dataclass, field
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from reftlens.generation.session import Session


@dataclass
class _Finished:
    """The best `size` ended hypotheses of one prompt: `(score per token, tokens, edited)`."""

    size: int
    hypotheses: list[tuple[float, list[int], Tensor]] = field(default_factory=list)

    def add(self, score: float, tokens: list[int], edited: Tensor) -> None:
        self.hypotheses.append((score, tokens, edited))
        self.hypotheses.sort(key=lambda h: h[0], reverse=True)
        del self.hypotheses[self.size :]

    def beats(self, best_running: float) -> bool:
        return len(self.hypotheses) == self.size and self.hypotheses[-1][0] >= best_running


def beam_search(session: Session, beams: int, bar: Any) -> None:
    """Fill `session` with the best hypothesis of each prompt: highest mean log-probability per token.

    At each step the best continuations of a prompt's beams are looked at, enough of them that `beams` do not end;
    those that end with a stop token and rank among the first `beams` are finished, the best others run on. A prompt
    is done when `beams` hypotheses have finished and no running beam scores higher.
    """
    n = len(session.ids)
    first = session.next_logits()
    _expand(session, beams)
    logits = first.repeat_interleave(beams, dim=0)
    scores = torch.full((n, beams), -torch.inf, device=logits.device)
    scores[:, 0] = 0.0  # all beams are equal at first: let one of them speak
    finished = [_Finished(beams) for _ in range(n)]
    over = [False] * n
    length = 0
    while True:
        logprobs = session.scores(logits.log_softmax(dim=-1))
        total = (scores.flatten()[:, None] + logprobs).view(n, -1)
        best, flat = total.topk(max(2, 1 + len(session.stops)) * beams, dim=1)
        length += 1
        bar.update()
        parents, chosen, scores = _select(session, best, flat, logprobs.shape[-1], beams, length, finished, over)
        for row in range(n):
            over[row] = over[row] or finished[row].beats(scores[row, 0].item() / length)
        _reorder(session, parents)
        session.append(chosen)
        if all(over) or length >= session.decoding.max_new_tokens:
            break
        logits = session.next_logits()
    _collapse(session, finished, over, scores, beams, length)


def _expand(session: "Session", beams: int) -> None:
    """One row per beam instead of one per prompt, the prompt's cache copied."""
    for name in ("tokens", "role", "edited", "done"):
        tensor = getattr(session, name)
        setattr(session, name, repeat(tensor, "n ... -> (n beams) ...", beams=beams))
    session.ids = [[] for _ in range(len(session.ids) * beams)]
    if session.cache is not None:  # a model that checkpoints gradients in train mode keeps none
        session.cache.batch_repeat_interleave(beams)


def _reorder(session: "Session", parents: Tensor) -> None:
    for name in ("tokens", "role", "edited"):
        setattr(session, name, getattr(session, name)[parents])
    session.ids = [list(session.ids[i]) for i in parents.tolist()]
    session.done = torch.zeros_like(session.done)  # a beam that ends leaves the batch through `_Finished`
    if session.cache is not None:
        session.cache.reorder_cache(parents)


def _select(
    session: "Session", best: Tensor, flat: Tensor, vocab: int, beams: int, length: int,
    finished: list[_Finished], over: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Parents, tokens and scores of the beams that run on; ended hypotheses go to `finished`."""
    parents, tokens, scores = [], [], []
    for row in range(best.shape[0]):
        kept = 0
        for rank, (score, index) in enumerate(zip(best[row].tolist(), flat[row].tolist(), strict=True)):
            beam, token = divmod(index, vocab)
            parent = row * beams + beam
            if token in session.stops:
                if rank < beams and not over[row]:
                    edited = torch.cat([session.edited[parent], session.edited.new_zeros(1)])
                    finished[row].add(score / length, [*session.ids[parent], token], edited)
                continue
            if kept < beams:
                parents.append(parent)
                tokens.append(token)
                scores.append(score)
                kept += 1
    device = best.device
    return (
        torch.tensor(parents, device=device),
        torch.tensor(tokens, device=device),
        torch.tensor(scores, device=device).view(-1, beams),
    )


def _collapse(
    session: "Session", finished: list[_Finished], over: list[bool], scores: Tensor, beams: int, length: int
) -> None:
    """Leave only the best hypothesis of each prompt in the session."""
    ids, edited = [], []
    for row, done in enumerate(finished):
        if not over[row]:
            for beam in range(beams):
                running = row * beams + beam
                done.add(scores[row, beam].item() / length, session.ids[running], session.edited[running])
        _, tokens, marks = done.hypotheses[0]
        ids.append(tokens)
        prompt = len(session.prompt_ids[row])
        start = session.tokens.shape[1] - length - prompt
        edited.append(marks[start : start + prompt + len(tokens)])
    session.ids = ids
    width = max(len(e) for e in edited)
    session.edited = torch.stack([torch.cat([e, e.new_zeros(width - len(e))]) for e in edited])
    session.role = torch.stack([torch.arange(width, device=e.device) < len(e) for e in edited]).long()
