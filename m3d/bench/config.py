"""What a run of the benchmark asks, of which scans, and beside which twin; see ``configs/bench/``."""

from dataclasses import dataclass, field
from typing import Any, Literal

from data_prep.record import NEEDS
from m3d.bench.kinds import TEXT, check_kinds
from m3d.tasks import check_tasks

__all__ = ["BenchConfig", "TaskConfig"]

Twin = Literal["zeros", "shuffled"]


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Which records of a task are asked; everything that is not said is all of them.

    Attributes:
        datasets: Only records of these data sets (``source.dataset``), such as ``M3D-Seg:CT-ORG``.
        subsets: Only records of these subsets of their data set (``meta.subsets``), such as ``test1k`` of M3D-Cap.
        subtasks: Only these kinds: question families, ``name`` or ``description``.
        names: Only records about these structures.
        most: So many records at most, drawn with the run's seed.
        max_new_tokens: Of an answer, with all that it rests on.
        prompts: By what masks are asked for, each a row of its own: ``text``, the record's own words; ``point``,
            ``points`` (several, inside and outside), ``scribble``, ``box``, ``slice_box``, ``mask`` (an earlier one,
            not quite right), ``clicks`` (one after another, where the answer is wrong); or together: ``text+point``.
    """

    datasets: tuple[str, ...] = ()
    subsets: tuple[str, ...] = ()
    subtasks: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    most: int | None = None
    max_new_tokens: int = 256
    prompts: tuple[str, ...] = (TEXT,)

    def __post_init__(self) -> None:
        check_kinds(self.prompts)
        if self.most is not None and self.most < 1:
            raise ValueError(f"most={self.most} must be 1 or more; leave it out for all records")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """A run of the benchmark.

    Attributes:
        tasks: What is asked, by the name of the task.
        split: Of the store.
        blind: The twin that is asked the same: ``zeros`` sees no voxel, ``shuffled`` another scan; None for no twin.
        batch: Answers that are written at once about one scan.
        likelihoods: Whether the options of closed questions are also judged by how likely the model finds them.
        scans: Where the scans themselves are, as a source of ``m3d data prepare``: masks and boxes are then judged on
            each scan's own grid. Without it, on the store's.
        root: Where a relative root of ``scans`` begins.
        most_scans: So many scans at most, the first of the store: for a quick look.
        pools: Of retrieval, each a subset of the data set by the pool's name; without any, pools are drawn.
        keep_masks: Whether the masks of answers are kept as files; without them only protocol m3d can be scored.
        seed: Of all that is drawn.
    """

    tasks: dict[str, TaskConfig]
    split: str = "test"
    blind: Twin | None = "zeros"
    batch: int = 16
    likelihoods: bool = True
    scans: dict[str, Any] | None = None
    root: str = "."
    most_scans: int | None = None
    pools: dict[str, str] = field(default_factory=dict)
    keep_masks: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_tasks(self.tasks, "tasks")
        if not self.tasks:
            raise ValueError("tasks is empty; name some, such as tasks: {report: {}, vqa.closed: {}}")
        for name, least in (("batch", self.batch), ("most_scans", self.most_scans)):
            if least is not None and least < 1:
                raise ValueError(f"{name}={least} must be 1 or more")
        for name, task in self.tasks.items():
            if task.prompts != (TEXT,) and "masks" not in NEEDS[name]:
                raise ValueError(f"tasks.{name}.prompts: only masks are asked for by other than text; leave it out")
