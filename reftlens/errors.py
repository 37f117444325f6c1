"""What is raised where no built-in error says it; each message says what was seen, what was expected and what to do."""


class CheckpointMismatch(ValueError):
    """The checkpoint on disk belongs to another run."""


class HookNotFound(KeyError):
    """No hook of that name; the message suggests near ones."""

    def __str__(self) -> str:
        return str(self.args[0])


class ModelNotAvailable(OSError):
    """No source had the model; the message says what each of them answered."""


class SiteNeverFired(RuntimeError):
    """A site was to be edited and no hidden state passed through it."""


class StoreMismatch(ValueError):
    """What is on disk does not fit: another model, width, kind or format; the message names it."""


class TrainingDiverged(FloatingPointError):
    """A loss or gradient became NaN or infinite; the message names the step and the likely cause."""
