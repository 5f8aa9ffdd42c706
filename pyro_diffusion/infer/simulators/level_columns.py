"""What the networks of every level of a program with plates of rows are given, number by number."""

from collections.abc import Mapping, Sequence

from torch import nn

from pyro_diffusion.infer.simulators.level_networks import FEATURES, LevelSizes, row_widths
from pyro_diffusion.infer.simulators.linear_regression import Column
from pyro_diffusion.nn.regressions import MOMENTS, regression_size

__all__ = ["LevelColumns"]


class LevelColumns:
    """Which levels a level knows of, and what each number of its rows' context is.

    Args:
        sizes: of every level, outer ones first.
        encoders: modules of the observed sites that have one, by name.
    """

    def __init__(self, sizes: Sequence[LevelSizes], encoders: Mapping[str, nn.Module]) -> None:
        self.sizes = tuple(sizes)
        self._sites: list[list[Column]] = []
        for each in self.sizes:
            own: list[Column] = []
            for site, width in zip(each.observed, row_widths(each, encoders), strict=True):
                own += [Column.LEARNED if site.encoded else Column.VALUE] * width
            self._sites.append(own)

    def around(self, level: int) -> list[int]:
        """Levels of latents around a level, outermost first."""
        return [j for j in self._outer(level) if self.sizes[j].latents]

    def seen(self, level: int) -> list[int]:
        """Levels with data around a level of latents, which may depend on these data, too."""
        outer = self._outer(level) if self.sizes[level].latents else []
        return [j for j in outer if self.sizes[j].observed]

    def regressed(self, level: int) -> bool:
        """Whether a level's rows are so few numbers that regressions among them are of use."""
        encoded = any(site.encoded for site in self.sizes[level].observed)
        return 0 < self._numbers(level) <= MOMENTS and not encoded

    def given(self, level: int) -> list[Column]:
        """Latents and data around a level's rows."""
        found = [Column.VALUE] * sum(self.sizes[j].latents for j in self.around(level))
        for j in self.seen(level):
            found += self._sites[j] + [Column.COUNT] * bool(self.sizes[j].plate)
        return found

    def row(self, level: int) -> list[Column]:
        """A row's own data, then of each set within it learned features, regressions and moments."""
        found = self._sites[level] + [Column.COUNT] * self.sizes[level].marked
        for j in self._children(level):
            found += [Column.LEARNED] * FEATURES + self._common(j)
            if self.regressed(j):
                size = self._numbers(j)
                found += [Column.VALUE] * (size + regression_size(size)) + [Column.COUNT] * 2
        return found

    def pooled_size(self, level: int) -> int:
        """Numbers that a level's rows are encoded with, of all its rows' sets together."""
        direct = [self._numbers(j) for j in self._children(level) if self.regressed(j)]
        return sum(direct) + len(self._common(level))

    def _common(self, level: int) -> list[Column]:
        """Regressions in the sets within a level's rows, and how those sets vary, beside learned features."""
        found = []
        for j in self._sets_within(level):
            size = self._numbers(j)
            found += [Column.VALUE] * regression_size(size) + [Column.COUNT]
            if self.sizes[j].parent == level:
                found += [Column.VALUE] * 4 * size + [Column.COUNT] * 3
        return found

    def _sets_within(self, level: int) -> list[int]:
        """Levels of regressed sets within a level's rows, each before those within it."""
        found = []
        for j in self._children(level):
            found += [j] * self.regressed(j) + self._sets_within(j)
        return found

    def _numbers(self, level: int) -> int:
        return sum(site.size for site in self.sizes[level].observed)

    def _children(self, level: int) -> list[int]:
        return [j for j, other in enumerate(self.sizes) if other.parent == level]

    def _outer(self, level: int) -> list[int]:
        """Levels around a level, outermost first."""
        found: list[int] = []
        parent = self.sizes[level].parent
        while parent >= 0:
            found.insert(0, parent)
            parent = self.sizes[parent].parent
        return found
