"""Find out by running who adds a block's result to the state: the block itself, or the model's forward.

In the first case the results are the new state, and a block that is switched off gives back its argument; in the second
it gives zeros. Forwards in which blocks return zeros show what the next block gets from elsewhere.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .record import Call
from .subject import Subject
from .traces import has_residual
from .wiring import Site, Watcher, Zeroing, independent, unchanged

Key = tuple[int, int]  # of a call


@dataclass(frozen=True)
class Trial:
    """Runs of a model on one of its samples, and on the same sample with other noise, in which some calls return zeros.

    Attributes:
        first: the sample; calls: of a forward of it alone. watcher: has run. state: path of the noisy state in the
            inputs, None where there is none.
    """

    subject: Subject
    first: int
    calls: Sequence[Call]
    watcher: Watcher
    state: str | None

    def zeroing(self, zeroed: Iterable[Key], watch: Iterable[Key]) -> Zeroing:
        rows = torch.tensor([self.first, self.first])
        replace = None if self.state is None else {self.state: self.subject.inputs.disturbed(self.state, rows, 1)}
        run = Zeroing(zeroed, watch)
        run.run(self.subject.model, self.watcher.sites, lambda: self.subject.forward(rows, replace=replace))
        return run


def settle_adds(trial: Trial, sites: Sequence[Site], adds: bool | None) -> None:
    """Settle `Site.adds` of the blocks, class by class. adds: what the adapter says of all of them, if anything.

    Raises:
        ValueError: what the runs show does not tell; names a block."""
    of = {site.module: site for site in sites}
    order = [call for call in trial.calls if call.module in of]
    kinds: dict[object, list[Call]] = {}
    for call in order:
        kinds.setdefault(_kind(of[call.module]), []).append(call)
    for calls in kinds.values():
        alike = list(dict.fromkeys(of[call.module] for call in calls))
        if adds is None and not any(site.chained for site in alike):
            in_sequence = any(
                call.parent is not None and isinstance(call.parent.module, nn.Sequential) for call in calls
            )
            verdict = not in_sequence and _Question(trial, of, order, calls).forward_adds()
        else:
            verdict = bool(adds)
        for site in alike:
            site.adds = verdict


def _kind(site: Site) -> object:
    """Blocks of one class are alike; an nn.Sequential may be anything, so its place in the model counts, too."""
    kind = type(site.module)
    return (kind, re.sub(r"\d+", "#", site.name)) if issubclass(kind, nn.Sequential) else kind


class _Question:
    """Whether the forward adds the results of `calls`, which are calls of blocks of one kind, to its state.

    Args:
        order: the calls of all blocks."""

    def __init__(self, trial: Trial, of: dict[nn.Module, Site], order: Sequence[Call], calls: Sequence[Call]) -> None:
        self.trial, self.of, self.order, self.calls = trial, of, order, calls
        self.path = {call.key: next(iter(of[call.module].state.values())) for call in order}
        self.site = of[calls[0].module]

    def forward_adds(self) -> bool:
        keys = {call.key for call in self.calls}
        pairs = [pair for pair in itertools.pairwise(self.order) if pair[0].key in keys]
        # Every second one, so that what enters them depends on blocks that do run.
        some = pairs[1::2] or pairs
        before = {b.key: a.key for a, b in itertools.pairwise(self.order)}
        alone = self._run(a.key for a, _ in some)
        # Without what comes before, too: another state enters them.
        both = self._run(key for a, _ in pairs for key in (a.key, before.get(a.key)) if key is not None)
        votes = []
        for pair in pairs:
            vote = self._vote(pair, alone if pair in some else None, both)
            if vote is False:
                return False
            votes.append(vote)
        residual = None if any(votes) else self._residual
        if any(votes) or (residual is False and len(self.calls) > 1):
            return True
        if residual:  # it returns a state, which the forward mixes with others
            return False
        raise ValueError(
            f"{self.trial.subject.kind}: cannot tell what forward does with the results of {self.site.name} and its "
            "like: say with register_adapter(..., Adapter(adds=True)) that it adds them to the state, with adds=False "
            "that they are the new state"
        )

    def _run(self, zeroed: Iterable[Key]) -> Zeroing:
        return self.trial.zeroing(zeroed, self.path)

    @property
    def _residual(self) -> bool | None:
        return has_residual(self.trial.subject, self.trial.first, self.site)

    def _vote(self, pair: tuple[Call, Call], alone: Zeroing | None, both: Zeroing) -> bool | None:
        """True: the next block gets the state as it entered. False: without the result there is no state. None: none
        of these."""
        x_both, y_both = (self._entering(both, call) for call in pair)
        if x_both is None or y_both is None:
            return None
        dim, layout = self._place(pair[1])
        if independent(y_both, dim, layout) and not independent(x_both, *self._place(pair[0])):
            return False
        if alone is None:
            return None
        x, y = (self._entering(alone, call) for call in pair)
        if x is None or y is None:
            return None
        if independent(y, dim, layout):
            return False
        if unchanged(x, y):
            return True
        if torch.equal(x, x_both):
            return True if unchanged(x_both, y_both) else None
        if torch.equal(y, y_both):  # it does not depend on what entered
            if self._residual is not False:
                return False
            return any(unchanged(entry, y) for entry in self._earlier(alone, pair[0]))
        if x.shape == y.shape == y_both.shape and torch.allclose(
            y - x, y_both - x_both, rtol=1e-3, atol=1e-4 * float(x.abs().max())
        ):
            return True  # with something else added to it
        return None

    def _place(self, call: Call) -> tuple[int, int]:
        """The dimension of the samples in what enters a block, and their layout there."""
        return self.trial.watcher.argument_dims[call.key][self.path[call.key]], self.of[call.module].layout

    def _entering(self, run: Zeroing, call: Call) -> Tensor | None:
        return run.entries.get(call.key, {}).get(self.path[call.key])

    def _earlier(self, run: Zeroing, call: Call) -> list[Tensor]:
        """The states that entered the earlier blocks. Of two states that alternate, a block changes one."""
        entries = (self._entering(run, c) for c in self.order if c.order < call.order)
        return [entry for entry in entries if entry is not None]
