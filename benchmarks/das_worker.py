"""One contender of `das.py`: answers `step N` (N threads) with the CPU seconds of what it was asked for.

    python das_worker.py CONTENDER MODEL_FOLDER BASIS_FILE [LAYER ...]

`reftlens`, `fit_das` (its own environment) and `pyvene` (the peers'): one DAS optimizer step at layer 15, from the
basis in the file, and the loss of the first. `reftlens-map`: the map of the layers. `pyvene-map`: at each of a few
sites one optimizer step and one batch scored.
"""

import json
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import das_shapes as shape
import torch
from torch.nn import functional as F
from worker import plain_model

warnings.filterwarnings("ignore")


class Turns:
    """Waits for `step N`, and answers it when the work is done; the first answer is `ready`."""

    def __init__(self):
        self.started, self.first_loss = None, None

    def done(self, **more):
        """Report what just ended and wait for the next request. False: the end."""
        if self.started is None:
            self.say(ready=True, loss=self.first_loss)
        else:
            self.say(cpu=time.process_time() - self.started, **more)
        words = sys.stdin.readline().split()
        if not words or words[0] != "step":
            return False
        torch.set_num_threads(int(words[1]))
        self.started = time.process_time()
        return True

    @staticmethod
    def say(**answer):
        print(json.dumps(answer), flush=True)


class Enough(Exception):
    """No further step is wanted."""


def batch_of(rows):
    from reftlens.text.batch import batch_from_rows

    source = batch_from_rows(rows.source, [[1] * shape.LENGTH] * len(rows.source))
    ids = [[*base, target] for base, target in zip(rows.base, rows.target, strict=True)]
    return batch_from_rows(ids, [[1] * shape.LENGTH + [2]] * len(ids)).with_sources(source)


def reftlens_steps(turns, folder, basis):
    """The public `fit`, one optimizer step at a time."""
    import reftlens as rl

    model = rl.load_model(folder, progress=False)
    das = rl.DAS(model.cfg.d_model, shape.RANK, basis=basis)
    reft = rl.ReFT({rl.resid_post(shape.LAYER, "last"): das})

    def on_step(step):
        turns.first_loss = turns.first_loss or step.loss
        if not turns.done():
            raise Enough

    data = batch_of(shape.pairs(shape.BATCH))
    with suppress(Enough):
        rl.fit(reft, model, data, steps=1000, lr=shape.LR, batch_size=shape.BATCH, on_step=on_step, progress=False)


def fit_das_steps(turns, folder, basis):
    """The public `fit_das`; torch calls us after each step of its optimizer, and its loss is read in passing."""
    from torch.optim.optimizer import register_optimizer_step_post_hook
    from transformer_lens.tools.analysis.interchange import fit_das

    import reftlens as rl

    model, rows = rl.load_model(folder, progress=False), shape.pairs(shape.BATCH)
    base, source, target = (torch.tensor(x) for x in rows)
    last = torch.full((shape.BATCH,), shape.LENGTH - 1)

    def task_logits(tokens):
        logits = model(tokens)[:, -1]
        if logits.requires_grad and turns.first_loss is None:  # its rows are shuffled, and the mean does not mind
            row = [rows.base.index(ids) for ids in tokens.tolist()]
            turns.first_loss = F.cross_entropy(logits.detach(), target[row]).item()
        return logits

    def after(*_):
        if not turns.done():
            raise Enough

    register_optimizer_step_post_hook(after)
    settings = dict(
        rank=shape.RANK, base_positions=last, source_positions=last, epochs=1000, batch_size=shape.BATCH, lr=shape.LR
    )
    with suppress(Enough):
        fit_das(model, f"blocks.{shape.LAYER}.hook_out", base, source, target, task_logits, **settings)


def intervenable(model, layer):
    import pyvene

    kind = pyvene.LowRankRotatedSpaceIntervention
    place = pyvene.RepresentationConfig(layer, "block_output", low_rank_dimension=shape.RANK, intervention_type=kind)
    made = pyvene.IntervenableModel(pyvene.IntervenableConfig(representations=[place]), model=model)
    made.disable_model_gradients()
    return made


def pyvene_step(made, rows, place):
    """`(train, score)`: an optimizer step as in pyvene's own training loop, and the hits of a batch."""
    base, source, target = (torch.tensor(x) for x in rows)
    optimizer = torch.optim.Adam(made.get_trainable_parameters(), lr=shape.LR)

    def logits():
        at = {"sources->base": shape.LENGTH + place}
        return made({"input_ids": base}, [{"input_ids": source}], at)[1].logits[:, -1]

    def train():
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(logits(), target)
        loss.backward()
        optimizer.step()
        return loss.item()

    @torch.no_grad()
    def score():
        return (logits().argmax(dim=-1) == target).tolist()

    return train, score


def pyvene_steps(turns, folder, basis):
    made = intervenable(plain_model(folder), shape.LAYER)
    (intervention,) = made.interventions.values()
    with torch.no_grad():
        intervention.rotate_layer.weight = basis
    train, _ = pyvene_step(made, shape.pairs(shape.BATCH), -1)
    turns.first_loss = train()
    while turns.done():
        train()


def timed(function):
    began = time.process_time()
    function()
    return time.process_time() - began


def pyvene_map(turns, folder, _):
    """Nothing is shared between sites: each has its own loop, so a few of them tell the time of all."""
    model, rows = plain_model(folder), shape.pairs(shape.BATCH)
    steps = {f"{layer} {place}": pyvene_step(intervenable(model, layer), rows, place) for layer, place in shape.SITES}
    for train, _ in steps.values():
        train()
    found = {}
    while turns.done(**found):
        found = {"train": {site: timed(train) for site, (train, _) in steps.items()}}
        found["score"] = {site: timed(score) for site, (_, score) in steps.items()}


def reftlens_map(turns, folder, _):
    """One call of `interchange_map`, capture, checks, held-out scores and permutation tests included."""
    import reftlens as rl

    model = rl.load_model(folder, progress=False)
    train, test = batch_of(shape.pairs(shape.MAP_TRAIN, seed=1)), batch_of(shape.pairs(shape.MAP_TEST, seed=2))
    config = rl.FitConfig(epochs=shape.MAP_EPOCHS, lr=shape.LR, batch_size=shape.BATCH)
    layers = [int(layer) for layer in sys.argv[4:]]
    places = [rl.positions.Nth(place) for place in shape.MAP_PLACES]
    while turns.done():
        found = rl.interchange_map(
            model,
            train,
            test,
            layers=layers,
            positions=places,
            ranks=[shape.RANK],
            config=config,
            progress=False,
        )
        assert len(found.cells) == len(layers) * len(shape.MAP_PLACES)


CONTENDERS = {
    "reftlens": reftlens_steps,
    "fit_das": fit_das_steps,
    "pyvene": pyvene_steps,
    "reftlens-map": reftlens_map,
    "pyvene-map": pyvene_map,
}


def main():
    contender, folder, basis = sys.argv[1:4]
    torch.set_num_threads(1)
    CONTENDERS[contender](Turns(), folder, torch.tensor(json.loads(Path(basis).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
