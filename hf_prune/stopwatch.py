"""Where the time of a run goes: the clock read at the events that a run tells of anyway.

The same stages are measured on a few images before a run (cost.py) and in the run itself, so that the two can be held
against each other stage by stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

LOOKING, READING, OTHER, DISTILLING = "looking at the model", "reading images", "other", "distilling"
BLOCKS, BETWEEN = "pruning blocks", "between blocks"
# the event, or the text of a "stage", with which a stage begins; any other text is OTHER
STAGES = {
    "look": LOOKING,
    "start": READING,
    "images": LOOKING,
    "block": BLOCKS,
    "advance": BETWEEN,
    "distill": DISTILLING,
    "reordering channels": "reordering channels",
    "weighing samples by their influence on the output": "weighing samples",
}
REORDERING, WEIGHING = STAGES["reordering channels"], STAGES["weighing samples by their influence on the output"]


class Spent(NamedTuple):
    """seconds by the clock, cpu seconds of this process: on a machine that does other work too they differ."""

    seconds: float = 0.0
    cpu: float = 0.0

    def plus(self, other: Spent, times: float = 1.0) -> Spent:
        return Spent(self.seconds + times * other.seconds, self.cpu + times * other.cpu)


def now() -> Spent:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Spent(time.perf_counter(), time.process_time())


def clock(work: Callable[[], Any]) -> Spent:
    """What `work` takes."""
    began = now()
    work()
    return now().plus(began, -1.0)


@dataclass(frozen=True)
class Lap:
    stage: str
    block: str | None  # of BLOCKS and BETWEEN: the unit
    spent: Spent


class Stopwatch:
    """Hands events on to `tell`, and keeps what lies between those that begin a stage."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self.tell = tell
        self.laps: list[Lap] = []
        self.stage, self.block, self.began = READING, None, now()  # of the first batch

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        stage = STAGES.get(event["text"], OTHER) if kind == "stage" else STAGES.get(kind)
        if stage is not None:
            self.lap(stage, event.get("block"))
        self.tell(event)

    def lap(self, stage: str = OTHER, block: Any = None) -> None:
        """End the stage that runs, and begin another."""
        ended = now()
        self.laps.append(Lap(self.stage, self.block, ended.plus(self.began, -1.0)))
        self.stage, self.block, self.began = stage, block, ended

    def stages(self) -> dict[str, Spent]:
        """By stage, in the order of their first laps."""
        found: dict[str, Spent] = {}
        for lap in self.laps:
            found[lap.stage] = found.get(lap.stage, Spent()).plus(lap.spent)
        return found


def as_json(stages: Mapping[str, Spent]) -> dict[str, dict[str, float]]:
    """The stages as JSON holds them."""
    return {name: {"seconds": spent.seconds, "cpu_seconds": spent.cpu} for name, spent in stages.items()}
