"""The gate of a problem: builds providers, runs them once, and admits those whose outputs are right."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from . import gate, protocol
from .case import Outputs, Provider, Run, Setup, Unavailable
from .deadline import Deadline, OutOfTime

AGAIN = "ours again"  # the A/A row


def without_broken(setup: Setup, barred: Mapping[str, str]) -> Setup:
    """The set-up without what broke an earlier process, {provider: why}.

    A provider whose capture failed is timed eagerly. It fails if it is a graph itself, or if the device failed in it.
    """

    def failing(reason: str) -> Callable[[], Run]:
        def make() -> Run:
            raise RuntimeError(reason)

        return make

    def without(provider: Provider) -> Provider:
        # Ours is captured both times or not at all, so what bars one bars the other.
        name = AGAIN if provider.role == "ours" and AGAIN in barred else provider.name
        if name not in barred:
            return provider
        if provider.capturable and protocol.DeviceFailed.says not in barred[name]:
            return dataclasses.replace(provider, capturable=False)
        return dataclasses.replace(provider, make=failing(barred[name]))

    return dataclasses.replace(setup, providers=tuple(without(provider) for provider in setup.providers))


def with_again(setup: Setup) -> list[Provider]:
    """The providers, and ours a second time, built anew, for the A/A row."""
    ours = [provider for provider in setup.providers if provider.role == "ours"]
    if len(ours) != 1:
        raise ValueError(f"providers: expected one with the role 'ours', got {[p.name for p in ours]}")
    return [*setup.providers, Provider(AGAIN, "again", ours[0].make, ours[0].capturable)]


class Gated:
    """The gate of a problem. It builds a provider, runs it once, and admits its call if its outputs are right."""

    def __init__(self, setup: Setup, device: torch.device, deadline: Deadline) -> None:
        self.setup = setup
        self.device = device
        self.deadline = deadline
        self.rows = {provider.name: empty_row(provider) for provider in with_again(setup)}
        self.pools: dict[str, set[protocol.Pool]] = {}  # private pools that a provider's graphs made
        self.timed: dict[str, float] = {}  # seconds per call, of those that were timed so far
        self._reference: Outputs | None = setup.reference()
        self._expression: Outputs | None = None

    def in_order(self, providers: Sequence[Provider]) -> list[Provider]:
        """The order of building: the plain expression, since ours may have twice its error; ours, without a time limit;
        rivals.
        """
        return sorted(providers, key=lambda p: (p.name != self.setup.expression, p.role not in ("ours", "again")))

    def forget(self) -> None:
        """Free the reference and the expression's outputs, which only the gate needs."""
        self._reference = self._expression = None

    def admit(self, provider: Provider, limited: bool = True) -> Run | None:
        """The provider's call; or None, with the reason in its row.

        limited: a rival must be built before the deadline.

        Raises:
            CaptureFailed, DeviceFailed: building or calling it left CUDA unusable.
        """
        row = self.rows[provider.name]
        before = protocol.private_pools(self.device).keys()
        limited = limited and provider.role not in ("ours", "again")
        try:
            if limited and self.deadline.over():
                raise OutOfTime
            with self.deadline.enforced() if limited else contextlib.nullcontext():
                call = provider.make()
                outputs = call()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
        except OutOfTime:
            row["status"] = "unavailable"
            row["reason"] = f"not built in time: the {self.deadline.seconds:.0f} s of this problem were over"
        except Unavailable as error:
            row["status"], row["reason"] = "unavailable", str(error)
        except protocol.CaptureFailed:
            raise
        except torch.OutOfMemoryError as error:
            row["status"], row["reason"] = "out of memory", protocol.one_line(error)
        except Exception as error:  # a rival may fail in any way, which is a result and does not end the run
            if self.device.type == "cuda" and re.search("captur|recorded as a CUDA graph", str(error)):
                raise protocol.CaptureFailed(provider.name, protocol.one_line(error)) from error
            if reason := protocol.device_error(self.device):
                raise protocol.DeviceFailed(provider.name, reason) from error
            row["status"], row["reason"] = "failed", f"{type(error).__name__}: {protocol.one_line(error)}"
        else:
            self.pools[provider.name] = set(protocol.private_pools(self.device).keys() - before)
            return call if self._right(provider, outputs) else None
        release(self.device)  # free what was built before the failure
        return None

    def _right(self, provider: Provider, outputs: Outputs) -> bool:
        assert self._reference is not None, "admit after forget"
        row = self.rows[provider.name]
        if provider.name == self.setup.expression:
            self._expression = outputs
        held = self._expression if provider.role in ("ours", "again") else None
        checked = gate.check(outputs, self._reference, self.setup.bounds, held)
        row["error"] = checked.error
        row["status"], row["reason"] = ("ok", None) if checked.passed else ("wrong", checked.reason)
        return checked.passed


def empty_row(provider: Provider) -> dict[str, Any]:
    times = ("median_us", "p20_us", "p80_us", "samples", "calls", "timer", "eager_us")
    rates = ("gb_per_s", "tflop_per_s", "roofline_share", "bound_by")
    rest = ("reason", "peak_bytes", "launches", "host_us", "joules", "watts", "error", "speedup", "verdict")
    return {
        "provider": provider.name,
        "role": provider.role,
        "status": "failed",
        **dict.fromkeys((*times, *rates, *rest)),
    }


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
