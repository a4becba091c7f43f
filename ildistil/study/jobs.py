"""What a study consists of: its jobs, and what is asked of who reads their configurations."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from ildistil.study.grid import Config

__all__ = ["Command", "Facts", "Job", "Plan", "Resolver"]

Command = Literal["fit", "finetune", "precompute"]


@dataclass(frozen=True)
class Facts:
    """What is known of a configuration once its models and data were looked at.

    Args:
        set: name of the first validation set, above what is measured on it.
        metrics: what is measured there.
        primary: which of these chooses the best student; ``None`` where nothing does.
        mode: whether that is to fall or to rise.
    """

    set: str
    metrics: Sequence[str]
    primary: str | None
    mode: Literal["min", "max"]


class Resolver(Protocol):
    """Reads configurations as the commands do, and checks them."""

    def configuration(self, command: Command, parts: Sequence[Config]) -> Config:
        """Return the whole configuration that partial ones make, the later winning.

        Raises:
            IldistilError: something in it is wrong.
        """

    def facts(self, command: Command, config: Config, later: Mapping[str, Config]) -> Facts:
        """Look at models, objectives and data of a configuration.

        Args:
            command: the command that reads it.
            config: all of it.
            later: models that are still to be made, each with the configuration that makes it.

        Raises:
            IldistilError: they don't exist, or don't go together.
        """

    def target_bytes(self, config: Config, later: Mapping[str, Config]) -> int:
        """Return how many bytes a configuration of ``precompute`` is still to write.

        Raises:
            IldistilError: its models or data don't exist, or something can't be stored.
        """


@dataclass(frozen=True)
class Job:
    """One command of a study, and the folder that it works in.

    Args:
        name: the folder within that of the study: runs/NAME, teachers/NAME, students/NAME or targets/NAME.
        command: what is run.
        factors: what differs between jobs of its kind.
        needs: names of jobs that it starts from.
        set: name of the validation set whose measures count.
        metric: which of these is the best student's; ``None`` for the last.
        mode: whether that is to fall or to rise.
        group: what it shares with runs of which only the best counts, as a fine-tuning over some learning rates.
        export: whether its student is exported.
    """

    name: str
    command: Command
    factors: dict[str, str] = field(default_factory=dict)
    needs: list[str] = field(default_factory=list)
    set: str = "val"
    metric: str | None = None
    mode: Literal["min", "max"] = "max"
    group: str | None = None
    export: bool = False


@dataclass
class Plan:
    """All jobs of a study, those that others need first, with their configurations by name."""

    title: str
    jobs: list[Job] = field(default_factory=list)
    configs: dict[str, Config] = field(default_factory=dict)

    def add(self, job: Job, config: Config) -> None:
        """Add a job, unless it is there."""
        if job.name not in self.configs:
            self.jobs.append(job)
            self.configs[job.name] = config

    def as_dict(self) -> dict[str, Any]:
        """Return the plan without the configurations, as it is kept."""
        return {"title": self.title, "jobs": [asdict(job) for job in self.jobs]}
