"""The facts that a figure depends on."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import kvcompile


def facts(threads: int) -> dict[str, Any]:
    """CPU, cores, threads, memory in GiB, versions, and the load that others make."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": _cpu(), "vectors": torch.backends.cpu.get_cpu_capability(), "cores": cores,
            "threads": threads, "load_before": load, "memory_gib": _memory(),
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "kvcompile": kvcompile.__version__}


def _cpu() -> str:
    """The CPU's name, as Linux tells it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _memory() -> float | None:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return round(pages * size / 2**30, 1)
