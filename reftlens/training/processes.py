"""Several processes that train one edit: each computes its rows of every step, and gradients are summed over all."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from reftlens.cone.plans import Job
from reftlens.errors import ProcessLost, reason_of


@dataclass(frozen=True)
class Processes:
    """The default group of `torch.distributed`, or one process alone."""

    number: int = 0
    count: int = 1

    @classmethod
    def here(cls, together: bool) -> "Processes":
        """Those of the group that was made, where they train together."""
        if together and dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        if together and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            warnings.warn(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']}, and no group of processes was made: each trains all rows by "
                "itself. Call accelerate.Accelerator() or torch.distributed.init_process_group() first",
                stacklevel=5,
            )
        return cls()

    def share(self, micro_batches: list[list[Job]], per_target: bool) -> list[list[Job]]:
        """The jobs of this process: of each micro-batch some rows, or whole micro-batches where rows are compared."""
        if self.count == 1:
            return micro_batches
        if not per_target:
            return [list(jobs) for jobs in micro_batches[self.number :: self.count]]
        part = self.part(per_target)
        own = [
            [replace(job, rows=job.rows[part]) for job in jobs if len(job.rows) > self.number] for jobs in micro_batches
        ]
        return [jobs for jobs in own if jobs]

    def part(self, per_target: bool) -> slice:
        """Which rows are those of this process; all, where rows are compared."""
        return slice(self.number, None, self.count) if per_target else slice(None)

    def gathered(
        self, parameters: Sequence[nn.Parameter], losses: Sequence[Tensor], targets: int
    ) -> tuple[Float[Tensor, " losses"], int]:
        """The losses of a step and the number of its targets, over all processes; so are the gradients from then on.

        A parameter that no process has a gradient of is left without one.
        """
        if self.count == 1:
            return torch.stack(list(losses)), targets
        device = parameters[0].device
        here = [0.0 if p.grad is None else 1.0 for p in parameters]
        numbers = torch.tensor([*here, float(targets)], dtype=torch.float64, device=device)
        loss = torch.stack([numbers.new_zeros(()), *losses]).sum()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([numbers, loss[None], *(grad.reshape(-1).double() for grad in grads)])
        with _others():
            dist.all_reduce(flat)
        *there, count, total = flat[: len(numbers) + 1].tolist()
        sums = flat[len(numbers) + 1 :].split([p.numel() for p in parameters])
        for parameter, known, own in zip(parameters, there, sums, strict=True):
            parameter.grad = own.view_as(parameter).to(parameter.dtype) if known else None
        return flat.new_tensor([total]), int(count)

    def totals(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """Each number summed over the processes."""
        if self.count == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=device)
        with _others():
            dist.all_reduce(sums)
        return sums.tolist()

    def check_same(self, told: Mapping[str, Any]) -> None:
        """Raise `ValueError` where a process tells something else than the others."""
        if self.count == 1:
            return
        every: list[Any] = [None] * self.count
        with _others():
            dist.all_gather_object(every, dict(told))
        for name in told:
            for number, other in enumerate(every):
                if other.get(name) != every[0].get(name):
                    raise ValueError(
                        f"processes 0 and {number} train with different {name}: {every[0].get(name)!r} and "
                        f"{other.get(name)!r}; expected one run, or fit(…, together=False) for runs of their own"
                    )

    @torch.no_grad()
    def start_alike(self, module: nn.Module) -> None:
        """Give each process the tensors that the first one has."""
        if self.count > 1:
            with _others():
                for tensor in (*module.parameters(), *module.buffers()):
                    dist.broadcast(tensor.data, 0)


ALONE = Processes()


@contextmanager
def _others() -> Iterator[None]:
    """A wait for the other processes, which may have ended."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(
            f"another process of this run has ended, or cannot be reached ({reason_of(error)}): look at what it said, "
            "and start all of them again; with checkpoint=… the run goes on from its last checkpoint"
        ) from error
