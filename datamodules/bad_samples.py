"""Bad samples: what one is called, and what a run does with them.

A bad sample is named with shard, key, member and reason. Under the policy `skip` it is taken out of its pack, the pack
is padded and later packs stay where they are; too many of them stop the run. Nothing is trained in its place.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from step37_lit.errors import ConfigError, UserError

BadSamplePolicy = Literal["raise", "skip"]
FILE_NAME = "bad_samples.jsonl"
WARNINGS = 5  # the file has all


class BadSample(UserError):
    """A sample that cannot be trained on; the message names shard, key, member and reason in one line.

    Args:
        shard: File of the shard.
        key: The sample's key; empty where the shard itself is damaged.
        member: Suffix of the member (`jpg`, `0.jpg`, `json`); empty where the sample as a whole is meant.
        reason: What was expected and what was found.
    """

    def __init__(self, shard: str, key: str, member: str, reason: str):
        self.shard, self.key, self.member, self.reason = shard, key, member, " ".join(reason.split())
        super().__init__(shard, key, member, self.reason)

    def __str__(self) -> str:
        named = [f"shard {_printable(self.shard)}"]
        named += [f"key {_printable(self.key)}"] if self.key else []
        named += [f"member {_printable(self.member)}"] if self.member else []
        return f"{', '.join(named)}: {_printable(self.reason)}"


@dataclass(frozen=True)
class BadRecord:
    """A bad sample as a loader process reports it and as `bad_samples.jsonl` keeps it."""

    set: str
    shard: str
    key: str
    member: str
    reason: str

    @classmethod
    def of(cls, set_name: str, error: BadSample) -> BadRecord:
        return cls(set_name, error.shard, error.key, error.member, error.reason)

    def __str__(self) -> str:
        return str(BadSample(self.shard, self.key, self.member, self.reason))


class BadSampleLedger:
    """Counts and reports the bad samples that one process meets.

    Args:
        policy: `raise` stops the run at the first one.
        max_share: Bad samples among an epoch's samples of this process above which the run stops.
        folder: Where `bad_samples.jsonl` is appended to; None keeps the counts only.
        rank: Data-parallel rank, for the file.
    """

    def __init__(self, policy: BadSamplePolicy, max_share: float, folder: Path | None = None, rank: int = 0):
        self.policy, self.max_share, self.folder, self.rank = policy, max_share, folder, rank
        self.records: list[BadRecord] = []
        self._of_epoch = 0

    def start_epoch(self) -> None:
        self._of_epoch = 0

    def note(self, records: Sequence[BadRecord], **where: int) -> None:
        """Lists records in the run's file, with the epoch and the step in which they were met."""
        if not records:
            return
        for record in records[: max(0, WARNINGS - len(self.records))]:
            warnings.warn(f"skipped a bad sample: {record}", stacklevel=2)
        self.records += records
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps({**where, "rank": self.rank, **asdict(record)}) for record in records]
            with (self.folder / FILE_NAME).open("a", encoding="utf-8") as file:
                file.write("".join(line + "\n" for line in lines))

    def add(self, records: Sequence[BadRecord], epoch: int, step: int, num_samples: int) -> None:
        """Takes over what a step met.

        Args:
            records: The bad samples of the step.
            epoch: Of the loader.
            step: Within the epoch.
            num_samples: All samples of the epoch that this process reads.

        Raises:
            ConfigError: the policy is `raise`, or more than `max_share` of the epoch's samples are bad.
        """
        if not records:
            return
        if self.policy == "raise":
            raise ConfigError("data.bad", "no bad sample, or skip", f"raise and {records[0]}")
        self.note(records, epoch=epoch, step=step)
        self._of_epoch += len(records)
        if self._of_epoch > self.max_share * num_samples:
            raise ConfigError(
                "data.max_bad_share",
                f"at most {self.max_share:g} of the {num_samples} samples of epoch {epoch} bad",
                f"{self._of_epoch}, the last one: {records[-1]}",
            )


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The bad samples of a run, in the order in which they were met; none where none were."""
    path = folder / FILE_NAME
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _printable(text: str) -> str:
    """Names come from untrusted files: control characters must not reach a terminal."""
    return text if text.isprintable() else ascii(text)
