"""Layer attribution (FoG-A) and representation alignment (AG-REPA) for flow-matching transformers."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# In a checkout the Triton kernels lie beside this package, in ../kernels (an installed package has them inside).
# With the checkout alone on PYTHONPATH they are found through this.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "__init__.py").is_file() and (_checkout / "pyproject.toml").is_file():
    __path__.append(str(_checkout))

from . import ops  # noqa: E402
from .alignment.aligner import Aligner  # noqa: E402
from .alignment.choice import ProbePlan  # noqa: E402
from .alignment.interface import InterfaceLoss  # noqa: E402
from .alignment.loss import AlignmentLoss  # noqa: E402
from .alignment.policy import choose_layers, layer_sensitivity, select_layers  # noqa: E402
from .alignment.resample import align_time  # noqa: E402
from .alignment.schedule import AlignmentSchedule, SimilarityStop, timestep_weight  # noqa: E402
from .alignment.selection import LayerSelection, read_selection, write_selection  # noqa: E402
from .alignment.self_targets import LayerSync, SelfFlow  # noqa: E402
from .attribution import export  # noqa: E402
from .attribution.adaptive import adaptive_scores  # noqa: E402
from .attribution.files import read_scores  # noqa: E402
from .attribution.foreign.hidden import HiddenStates  # noqa: E402
from .attribution.foreign.register import Adapter, register_adapter  # noqa: E402
from .attribution.gradients import first_order_scores, gradient_norm_scores  # noqa: E402
from .attribution.graph import release_graphs  # noqa: E402
from .attribution.metrics import VelocityRatio  # noqa: E402
from .attribution.plan import AblationPlan  # noqa: E402
from .attribution.runner import attribute_layers  # noqa: E402
from .attribution.scd import Stored, plot_scd, write_scd  # noqa: E402
from .attribution.scores import LayerScores  # noqa: E402
from .attribution.statistics import bootstrap_top_k, rank_stability, top_k_by_clips  # noqa: E402
from .attribution.stored import dissociation, lasp, linear_cka, pooled_hidden  # noqa: E402
from .models.conditioning import TokenConditioner  # noqa: E402
from .models.dit import DiT, DiTConfig  # noqa: E402
from .models.flow import probe_inputs  # noqa: E402
from .models.process import Process  # noqa: E402

if TYPE_CHECKING:
    from . import data, integrations, teachers

__all__ = [
    "AblationPlan",
    "Adapter",
    "Aligner",
    "AlignmentLoss",
    "AlignmentSchedule",
    "DiT",
    "DiTConfig",
    "HiddenStates",
    "InterfaceLoss",
    "LayerScores",
    "LayerSelection",
    "LayerSync",
    "ProbePlan",
    "Process",
    "SelfFlow",
    "SimilarityStop",
    "Stored",
    "TokenConditioner",
    "VelocityRatio",
    "adaptive_scores",
    "align_time",
    "attribute_layers",
    "bootstrap_top_k",
    "choose_layers",
    "data",
    "dissociation",
    "export",
    "first_order_scores",
    "gradient_norm_scores",
    "integrations",
    "lasp",
    "layer_sensitivity",
    "linear_cka",
    "ops",
    "plot_scd",
    "pooled_hidden",
    "probe_inputs",
    "rank_stability",
    "read_scores",
    "read_selection",
    "register_adapter",
    "release_graphs",
    "select_layers",
    "teachers",
    "timestep_weight",
    "top_k_by_clips",
    "write_scd",
    "write_selection",
]


def __getattr__(name: str) -> ModuleType:
    """`ag.data`, `ag.integrations` and `ag.teachers`, imported when they are first used."""
    if name in ("data", "integrations", "teachers"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
