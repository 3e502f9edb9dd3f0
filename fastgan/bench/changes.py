"""What changed between two files of results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import quantiles

from fastgan.bench.results import Row

LEAST_NOISE = 1.1
"""Times that differ by a smaller factor count as the same, on the quietest of machines too."""


@dataclass(frozen=True)
class Change:
    """One case, then and now."""

    then: Row
    now: Row
    same_machine: bool

    @property
    def ratios(self) -> tuple[float, float] | None:
        """Then and now: how many times as fast as the best of the peers that both have timed."""
        common = self.then.peers.keys() & self.now.peers.keys()
        if not common or not self.is_timed:
            return None
        then, now = (min(row.peers[name] for name in common) / float(row.fastgan_ms) for row in (self.then, self.now))
        return then, now

    @property
    def is_timed(self) -> bool:
        """Whether both have a time of ours."""
        return bool(self.then.fastgan_ms and self.now.fastgan_ms)

    @property
    def factor(self) -> float | None:
        """How many times as fast as then: by milliseconds, and between machines by the ratio to stock PyTorch."""
        if self.same_machine:
            return float(self.then.fastgan_ms) / float(self.now.fastgan_ms) if self.is_timed else None
        return self.ratios[1] / self.ratios[0] if self.ratios else None

    @property
    def size(self) -> float:
        """What changes are sorted by. None is larger than a time that is there no more, or was not before."""
        return math.inf if self.factor is None else abs(math.log(self.factor))


@dataclass(frozen=True)
class Comparison:
    """The cases that two files share, of which one has a time of ours at least."""

    then: Sequence[Row]
    now: Sequence[Row]

    @cached_property
    def changes(self) -> list[Change]:
        """The largest first."""
        earlier = {row.key: row for row in self.then}
        shared = [Change(earlier[row.key], row, self.same_machine) for row in self.now if row.key in earlier]
        found = [change for change in shared if change.then.fastgan_ms or change.now.fastgan_ms]
        return sorted(found, key=lambda change: -change.size)

    @property
    def same_machine(self) -> bool:
        return devices(self.then) == devices(self.now)

    @cached_property
    def noise(self) -> float:
        """A factor that counts as no change: nine in ten of stock PyTorch's times, the same code in both, differ by less."""
        if not self.same_machine:
            return LEAST_NOISE
        pairs = [(change.then.peers, change.now.peers) for change in self.changes]
        logs = [abs(math.log(then[name] / now[name])) for then, now in pairs for name in then.keys() & now.keys()]
        return max(LEAST_NOISE, math.exp(quantiles(logs, n=10)[-1])) if len(logs) > 1 else LEAST_NOISE

    def is_noise(self, change: Change) -> bool:
        return change.size <= math.log(self.noise)

    def verdict(self, change: Change) -> str:
        factor = change.factor
        if factor is None:
            return (
                "not to be compared" if change.is_timed else "no time now" if change.then.fastgan_ms else "no time then"
            )
        if self.is_noise(change):
            return "noise"
        return f"{max(factor, 1 / factor):.2f}× {self.words[factor < 1]}"

    @property
    def words(self) -> tuple[str, str]:
        """For what is more now, and less."""
        return ("faster", "slower") if self.same_machine else ("better", "worse")

    @property
    def basis(self) -> str:
        """What is compared, and what counts as noise."""
        if not self.same_machine:
            return (
                f"Another machine: {devices(self.then)} then, {devices(self.now)} now. So not milliseconds are compared, "
                "but how many times as fast as the best stock PyTorch ours is, of the peers that both have timed. "
                f"Less than {self.noise:.2f}× is noise."
            )
        why = "" if self.noise == LEAST_NOISE else ", as nine in ten of stock PyTorch's own times differ by up to that"
        return f"The same machine, so milliseconds are compared. Less than {self.noise:.2f}× is noise{why}."

    @property
    def summary(self) -> str:
        real = [change.factor for change in self.changes if change.factor is not None and not self.is_noise(change)]
        faster = sum(factor > 1 for factor in real)
        untimed = sum(change.factor is None for change in self.changes)
        more, less = self.words
        parts = [f"{faster} {more}", f"{len(real) - faster} {less}"]
        parts += [f"{len(self.changes) - len(real) - untimed} within noise"]
        parts += [f"{untimed} not to be compared"] * bool(untimed)
        new = len({row.key for row in self.now} - {row.key for row in self.then})
        return ", ".join(parts + [f"{new} not in the earlier file"] * bool(new))


def devices(rows: Sequence[Row]) -> str:
    """The machine of a file of results."""
    return ", ".join(sorted({row.device for row in rows})) or "no machine"
