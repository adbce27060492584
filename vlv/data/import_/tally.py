"""What became of the samples of an import, counted by reason."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from vlv.data.import_.recipe import Prepared

_EXAMPLES = 20  # kept for each reason


@dataclass(frozen=True)
class Note:
    """A sample that was left out, or kept without its caption."""

    path: str
    reason: str
    message: str


@dataclass
class Tally:
    """What became of samples: how many were found and kept, and by reason how many were dropped or lost their
    caption, with the first few of each."""

    found: int = 0
    kept: int = 0
    captions: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    captions_left_out: Counter[str] = field(default_factory=Counter)
    notes: list[Note] = field(default_factory=list)

    def add(self, sample: Prepared) -> None:
        """Count one sample."""
        self.found += 1
        if sample.content is None:
            reason, message = sample.record.status, sample.record.error_message or ""
            self.dropped[reason] += 1
            self._note(Note(sample.place.url, reason, message), self.dropped[reason])
            return
        self.kept += 1
        self.captions += sample.record.caption is not None
        if sample.caption_problem is not None:
            reason, message = sample.caption_problem
            self.captions_left_out[reason] += 1
            self._note(Note(sample.place.url, reason, message), self.captions_left_out[reason])

    def _note(self, note: Note, count: int) -> None:
        if count <= _EXAMPLES:
            self.notes.append(note)

    def extend(self, other: "Tally") -> None:
        """Add another tally, which comes after this one."""
        self.found += other.found
        self.kept += other.kept
        self.captions += other.captions
        self.dropped.update(other.dropped)
        self.captions_left_out.update(other.captions_left_out)
        have = Counter(note.reason for note in self.notes)
        for note in other.notes:
            have[note.reason] += 1
            self._note(note, have[note.reason])

    def to_json(self) -> dict[str, Any]:
        """For `from_json` (dataclasses.asdict breaks counters)."""
        return {**vars(self), "notes": [asdict(note) for note in self.notes]}

    @staticmethod
    def from_json(value: dict[str, Any]) -> "Tally":
        """A tally from what `to_json` gave."""
        reasons = {name: Counter(value[name]) for name in ("dropped", "captions_left_out")}
        return Tally(**{**value, **reasons, "notes": [Note(**note) for note in value["notes"]]})

    def counts(self) -> dict[str, int]:
        """Kept samples, those with a caption, and each reason."""
        reasons = self.dropped + self.captions_left_out
        return {"kept": self.kept, "with_caption": self.captions, **dict(sorted(reasons.items()))}
