"""FoG-A on other people's models: all streams in one forward, and blocks that run only what differs from the baseline.

The model runs once on S x B sequences, stream-major: the baseline's B samples, then those of each unit that is switched
off, in the order in which the units run. Streams are equal to the baseline up to their own unit. So a block, and any
other module that the forward calls outside of blocks, runs on the streams that differ by then; the others get copies of
the baseline's result. This is exact whatever the forward does between the blocks: long skips, joined streams, reshapes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from ..plan import AblationPlan, Unit
from .examine import Examination
from .record import flat, overridden, with_leaves
from .register import adapter_of
from .shell import Shell
from .subject import out_of_memory
from .wiring import Site, grown

ENGINES = ("prefix", "stacked", "loop")


class NotAStaircase(ValueError):
    """A batched form does not give what the model itself gives, or does not run."""


class BlockModel:
    """Another model, examined on a few of its samples, and the engines that score it.

    Args:
        inputs: a mapping of keyword arguments or a tuple of positional ones. batched, mask, block_list: as in
            `attribute_layers`.
        engine: "auto", or one of ENGINES.
        branches: whether block_list names modules whose results are added to the state.

    Use inside `guard.quiet`, in eval mode without gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        block_list: str | Sequence[str] | None = None,
        batched: Sequence[str] | Mapping[str, bool] | None = None,
        mask: Tensor | None = None,
        engine: str = "auto",
        alone: bool = False,
        branches: bool = False,
    ) -> None:
        adapter = adapter_of(model)
        adapter = replace(adapter, adds=True) if branches else adapter
        self.model = model
        coupled = engine == "loop" and alone
        self.known = Examination(model, inputs, adapter, block_list, batched, mask, coupled, whole=branches)
        self.blocks = self.known.blocks
        self.names = [block.name for block in self.blocks]
        self.depth = len(self.blocks)
        self.shell = Shell(self.known, {site.module: site for block in self.blocks for site in block.sites})
        self.samples, self.t, self.mask = self.known.inputs.samples, self.known.inputs.t, self.known.mask
        self.dtype, self.noise = self.known.dtype, self.known.noise
        self.settled = engine != "auto"
        self.engine = engine if self.settled else "stacked" if adapter.dense else "prefix"
        apart = [site.name for block in self.blocks for site in block.sites if site.layout > 1]
        if apart and not self.settled:
            warnings.warn(
                f"{self.known.kind}: the batch of {apart[0]} holds the parts of a sample (windows, copies for "
                "guidance) apart from each other; engine 'loop' runs, which costs a forward for each unit",
                stacklevel=4,
            )
            self.engine = "loop"
        self._without: tuple[Unit, Tensor] | None = None
        self._parts: dict[int, dict[str, Site]] = {}

    def evaluations(self, plan: AblationPlan) -> int:
        """Block evaluations of the staircase: L (L + 1) / 2 where each of L blocks runs once and all are scored.

        The stream of a set of blocks joins after the first of them, and runs the others with what it is given."""
        block_of = {block.sites[0].module: layer for layer, block in enumerate(self.blocks)}
        last_stream = {layer: stream for stream, unit in enumerate(plan.units, 1) for layer in unit.layers}
        joined, total = 1, 0
        for call in self.known.calls:
            if call.module in block_of:
                total += joined
                joined = max(joined, 1 + last_stream.get(block_of[call.module], 0))
        return total

    def run(self, plan: AblationPlan, rows: Tensor) -> Tensor:
        """Velocities [S, B, ...] of the samples `rows` (int64 [B]); stream 0 is the baseline.

        engine "auto" goes on from the staircase to the dense form to the loop where one fails, with a warning.

        Raises:
            NotAStaircase: the chosen engine does not give what the model itself gives."""
        while True:
            try:
                velocity = self._run(plan, rows)
                self._check(plan, rows, velocity)
                return velocity
            except Exception as error:
                if self.settled or self.engine == "loop" or out_of_memory(error):
                    raise
                following = ENGINES[ENGINES.index(self.engine) + 1]
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
                warnings.warn(
                    f"{self.known.kind}: engine {self.engine!r} fails ({reason:.200}); {following!r} runs instead",
                    stacklevel=5,
                )
                self.engine = following

    def _run(self, plan: AblationPlan, rows: Tensor) -> Tensor:
        units = [self._sites(unit) for unit in plan.units]
        if self.engine == "loop":
            return self._loop(units, rows)
        for site in (site for block in self.blocks for site in block.sites if site.layout > 1):
            raise NotAStaircase(f"{site.name}: its batch holds the parts of a sample apart from each other")
        return _Streams(self.shell, units, rows, shared=self.engine == "prefix").run()

    def at_once(self, plan: AblationPlan) -> int:
        """Number of samples in a pass, see `Shell.at_once`; all where the engine is no staircase."""
        return self.shell.at_once(plan.streams) if self.engine == "prefix" else self.samples

    def parts(self, layer: int) -> dict[str, Site]:
        """The parts of a block that can be switched off by themselves: {name: site}.

        For a layer that is a list: its modules that add to the state, by their names in the layer. For another block:
        its states, by the names of the arguments that carry them ("encoder_hidden_states")."""
        if layer not in self._parts:
            block = self.blocks[layer]
            adding = {
                s.name.removeprefix(f"{block.name}."): s for s in block.sites if not self._feeds_another(s, block.sites)
            }
            self._parts[layer] = adding if len(block.sites) > 1 else block.sites[0].by_state()
        return self._parts[layer]

    def _feeds_another(self, site: Site, sites: Sequence[Site]) -> bool:
        """Whether a module matters to one later module of its layer alone, as the norm before an attention does."""
        row = torch.tensor([self.known.first])
        later = sites[sites.index(site) + 1 :]
        return any(torch.equal(self._ablated([other], row), self._ablated([site, other], row)) for other in later)

    def _sites(self, unit: Unit) -> list[Site]:
        if unit.branch is not None:
            return [self.parts(unit.layer)[unit.branch]]
        return [site for layer in unit.layers for site in self.blocks[layer].sites]

    def _loop(self, units: Sequence[Sequence[Site]], rows: Tensor) -> Tensor:
        velocities = [self.known.subject.forward(rows)]
        return torch.stack(velocities + [self._ablated(sites, rows) for sites in units])

    def _ablated(self, sites: Sequence[Site], rows: Tensor) -> Tensor:
        """The velocity with the modules of one unit switched off."""
        of = {site.module: site for site in sites}

        def skip(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return of[module].off(forward, args, kwargs)

        with overridden(of, skip):
            return self.known.subject.forward(rows)

    def _check(self, plan: AblationPlan, rows: Tensor, velocity: Tensor) -> None:
        """Compare streams with forwards of the model itself: the baselines of some samples, and one ablation."""
        for i, row in enumerate(rows.tolist()):
            expected = self.known.references.get(row)
            if expected is not None and not self.known.subject.same(expected, velocity[0, i]):
                raise NotAStaircase(
                    f"{self.known.kind}: the baseline beside the ablations is not the model's own velocity "
                    f"(sample {row})"
                )
            if row == self.known.first and self.engine != "loop":
                unit = plan.units[0]
                if self._without is None or self._without[0] != unit:
                    self._without = unit, self._ablated(self._sites(unit), torch.tensor([row]))[0]
                if not self.known.subject.same(self._without[1], velocity[1, i]):
                    raise NotAStaircase(
                        f"{self.known.kind}: the velocity without {', '.join(self.names[n] for n in unit.layers)} is "
                        f"not what the model itself gives without it (sample {row})"
                    )


class _Streams:
    """One forward of all streams. `shared`: blocks run on the streams that differ from the baseline, not on all."""

    def __init__(self, shell: Shell, units: Sequence[Sequence[Site]], rows: Tensor, shared: bool) -> None:
        self.known, self.sites, self.rows, self.shared = shell.known, shell.sites, rows, shared
        self.batch, self.streams = rows.numel(), 1 + len(units)
        # {module: the streams that switch it off, each with the site that names the state}
        self.own: dict[nn.Module, list[tuple[int, Site]]] = {module: [] for module in self.sites}
        for stream, unit in enumerate(units, 1):
            for site in unit:
                self.own[site.module].append((stream, site))
        self.shell = shell.modules if shared else {}
        self.joined = 1  # streams that may differ from the baseline, which is the first
        self.inside = False
        self.counts: dict[nn.Module, int] = {}
        self.sizes = shell.calls(rows) if shared else {}

    def run(self) -> Tensor:
        modules = [*self.shell, *self.sites] if self.shared else [m for m, own in self.own.items() if own]
        with overridden(modules, self._call):
            velocity = self.known.subject.forward(self.rows, self.streams)
        return velocity.unflatten(0, (self.streams, self.batch))

    def _call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.inside:
            return forward(*args, **kwargs)
        number = self.counts.get(module, 0)
        self.counts[module] = number + 1
        self.inside = True
        try:
            if module in self.sites:
                return self._site(module, number, forward, args, kwargs)
            return self._other(module, number, forward, args, kwargs)
        finally:
            self.inside = False

    def _site(self, module: nn.Module, number: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        site, own = self.sites[module], self.own[module]
        paths, leaves, spec = flat((args, kwargs))
        if site.replaced & set(site.state.values()):
            raise NotAStaircase(f"{site.name}: puts its new state into an argument")
        entering: dict[str, list[Tensor]] = {}
        for result, argument in site.state.items() if not site.adds else ():
            leaf, dim = leaves[paths.index(argument)], site.dims[result]
            if leaf is None:
                raise NotAStaircase(f"{site.name}: its second state begins as None")
            size = self._size(site.name, leaf, dim, self.streams)
            # Copies: the block may write into its input.
            entering[result] = [leaf.narrow(dim, s * size, size).clone() for s, _ in own]
        written = self._written(site, (id(module), number), paths, leaves)
        given = leaves
        if self.shared:
            given = self._narrowed(site.name, (id(module), number), paths, leaves)
            args, kwargs = with_leaves(args, kwargs, leaves, given, spec)
        result_paths, results, result_spec = flat(forward(*args, **kwargs))
        same = {id(part): leaf for path, leaf, part in zip(paths, leaves, given) if path in site.written}
        for i, path in enumerate(result_paths):
            if path not in site.dims or not isinstance(results[i], Tensor):
                continue
            dim = site.dims[path]
            size = self._size(site.name, results[i], dim, self.joined if self.shared else self.streams)
            itself = same.get(id(results[i]))  # the argument, changed in place
            widened = self._widened(results[i], dim, size)
            if path not in site.state or not own:
                results[i] = widened if itself is None else itself
                continue
            results[i] = (widened.clone() if widened is results[i] else widened) if itself is None else itself
            for k, (stream, switched) in enumerate(own) if itself is None else ():
                if path not in switched.state:
                    continue
                part = results[i].narrow(dim, stream * size, size)
                part.zero_() if site.adds else part.copy_(entering[path][k])
        for leaf, dim, before in written:
            size = leaf.shape[dim] // self.streams
            if self.shared and self.joined < self.streams:
                rest = leaf.narrow(dim, self.joined * size, (self.streams - self.joined) * size)
                rest.unflatten(dim, (-1, size)).copy_(leaf.narrow(dim, 0, size).unsqueeze(dim))
            for (stream, _), value in zip(own, before):
                leaf.narrow(dim, stream * size, size).copy_(value)
        self.joined = max([self.joined, *(stream + 1 for stream, _ in own)])
        return tree_unflatten(results, result_spec)

    def _written(
        self, site: Site, key: tuple[int, int], paths: list[str], leaves: list[Any]
    ) -> list[tuple[Tensor, int, list[Tensor]]]:
        """The arguments that a block changes in place: each with the dimension of its samples, and copies of its parts
        in the streams that switch the block off."""
        written = []
        for path, leaf in zip(paths, leaves):
            if path not in site.written or not isinstance(leaf, Tensor):
                continue
            dim = self.known.watcher.argument_dims.get(key, {}).get(path)
            if dim is None:
                raise NotAStaircase(f"{site.name}: changes an argument that does not grow with the samples")
            size = self._size(site.name, leaf, dim, self.streams)
            written.append((leaf, dim, [leaf.narrow(dim, s * size, size).clone() for s, _ in self.own[site.module]]))
        return written

    def _other(self, module: nn.Module, number: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module outside of blocks, on the streams that differ by now where its shapes allow that."""
        dims = self.shell[module].get(number)
        paths, leaves, spec = flat((args, kwargs))
        if dims is None or self.joined == self.streams:
            return forward(*args, **kwargs)
        try:
            given = self._narrowed("", (id(module), number), paths, leaves)
        except NotAStaircase:
            return forward(*args, **kwargs)
        args, kwargs = with_leaves(args, kwargs, leaves, given, spec)
        result_paths, results, result_spec = flat(forward(*args, **kwargs))
        for i, path in enumerate(result_paths):
            if isinstance(results[i], Tensor) and path in dims:
                size = self._size(type(module).__name__, results[i], dims[path], self.joined)
                results[i] = self._widened(results[i], dims[path], size)
        return tree_unflatten(results, result_spec)

    def _narrowed(self, name: str, key: tuple[int, int], paths: list[str], leaves: list[Any]) -> list[Any]:
        call = self.sizes.get(key)
        tensors = {path: leaf.shape for path, leaf in zip(paths, leaves) if isinstance(leaf, Tensor)}
        if call is None or call.arguments.keys() != tensors.keys():
            raise NotAStaircase(f"{name}: is called otherwise than with one stream")
        dims = grown(call.arguments, tensors, self.streams, alike=True)
        changed = [path for path, shape in tensors.items() if shape != call.arguments[path] and path not in dims]
        if changed or not dims:
            shown = f"{list(tensors[changed[0]])}" if changed else "none"
            raise NotAStaircase(f"{name}: no argument, or one in an unknown way, grows with the streams ({shown})")
        if self.joined == self.streams:
            return leaves
        return [
            leaf.narrow(dims[path], 0, leaf.shape[dims[path]] // self.streams * self.joined) if path in dims else leaf
            for path, leaf in zip(paths, leaves)
        ]

    def _size(self, name: str, leaf: Tensor, dim: int, streams: int) -> int:
        if leaf.dim() <= dim or leaf.shape[dim] % (streams * self.batch):
            raise NotAStaircase(
                f"{name}: a state of shape {list(leaf.shape)} is not {streams} streams of {self.batch} samples"
            )
        return leaf.shape[dim] // streams

    def _widened(self, result: Tensor, dim: int, size: int) -> Tensor:
        """The result of all streams: those that have not joined get the baseline's."""
        missing = self.streams - self.joined
        if not self.shared or missing == 0:
            return result
        return torch.cat([result] + [result.narrow(dim, 0, size)] * missing, dim=dim)
