"""Layer attribution (FoG-A) and representation alignment (AG-REPA) for flow-matching transformers."""

from pathlib import Path

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
from .alignment.policy import LayerSelection, choose_layers, layer_sensitivity, select_layers  # noqa: E402
from .alignment.resample import align_time  # noqa: E402
from .alignment.schedule import AlignmentSchedule, SimilarityStop, timestep_weight  # noqa: E402
from .attribution.foreign.hidden import HiddenStates  # noqa: E402
from .attribution.plan import AblationPlan  # noqa: E402
from .attribution.runner import attribute_layers  # noqa: E402
from .attribution.scores import LayerScores  # noqa: E402
from .models.conditioning import TokenConditioner  # noqa: E402
from .models.dit import DiT, DiTConfig  # noqa: E402
from .models.flow import probe_inputs  # noqa: E402

__all__ = [
    "AblationPlan",
    "Aligner",
    "AlignmentLoss",
    "AlignmentSchedule",
    "DiT",
    "DiTConfig",
    "HiddenStates",
    "InterfaceLoss",
    "LayerScores",
    "LayerSelection",
    "ProbePlan",
    "SimilarityStop",
    "TokenConditioner",
    "align_time",
    "attribute_layers",
    "choose_layers",
    "layer_sensitivity",
    "ops",
    "probe_inputs",
    "select_layers",
    "timestep_weight",
]
