"""Clocks, temperature, power and energy of a card from NVML (`nvidia-ml-py`). Its settings are never changed."""

from __future__ import annotations

from typing import Any

import torch


class Nvml:
    """Readings of the card that `device` is, matched by UUID. A reading is None if NVML cannot give it."""

    def __init__(self, device: torch.device) -> None:
        self.handle: Any = None
        self.nvml: Any = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            # CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self.nvml = pynvml
        except Exception:  # no package, no library, no permission: readings are optional
            self.handle = None

    def _read(self, name: str, *arguments: Any) -> Any:
        if self.handle is None:
            return None
        try:
            return getattr(self.nvml, name)(self.handle, *arguments)
        except (self.nvml.NVMLError, AttributeError):  # not on this card, or not in this version of the package
            return None

    def driver(self) -> str | None:
        if self.handle is None:
            return None
        try:
            version = self.nvml.nvmlSystemGetDriverVersion()
        except self.nvml.NVMLError:
            return None
        return version.decode() if isinstance(version, bytes) else version

    def clock(self, domain: str) -> int | None:
        """The present clock in MHz; domain "SM" or "MEM"."""
        if self.handle is None:
            return None
        return self._read("nvmlDeviceGetClockInfo", getattr(self.nvml, f"NVML_CLOCK_{domain}"))

    def celsius(self) -> int | None:
        return None if self.handle is None else self._read("nvmlDeviceGetTemperature", 0)

    def watts(self) -> float | None:
        milliwatts = self._read("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1e3

    def joules(self) -> float | None:
        """Energy used since the driver was loaded."""
        millijoules = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def throttle(self) -> str | None:
        """Why the clocks are lowered, as a hexadecimal mask; None if unknown."""
        mask = self._read("nvmlDeviceGetCurrentClocksThrottleReasons")
        return None if mask is None else f"{mask:#x}"

    def utilisation(self) -> int | None:
        """Percentage of the last sampling period in which a kernel ran."""
        rates = self._read("nvmlDeviceGetUtilizationRates")
        return None if rates is None else rates.gpu
