"""Reversible networks for PyTorch: backward without stored activations, and what that costs in accuracy."""

from revnet_core.audit import BlockDrift as BlockDrift
from revnet_core.audit import GradientParity as GradientParity
from revnet_core.audit import audit_gradients as audit_gradients
from revnet_core.audit import audit_inverse as audit_inverse
from revnet_core.audit import audit_model_inverse as audit_model_inverse
from revnet_core.budget import Budgeted as Budgeted
from revnet_core.coupling import AdditiveCoupling as AdditiveCoupling
from revnet_core.downsampling import SpaceToDepth as SpaceToDepth
from revnet_core.errors import ChangedStateError as ChangedStateError
from revnet_core.errors import DepthError as DepthError
from revnet_core.errors import DoubleBackwardError as DoubleBackwardError
from revnet_core.errors import InPlaceError as InPlaceError
from revnet_core.errors import OutsideTensorError as OutsideTensorError
from revnet_core.errors import PrecisionError as PrecisionError
from revnet_core.errors import ReconstructionError as ReconstructionError
from revnet_core.errors import ReversibleError as ReversibleError
from revnet_core.errors import ShapeError as ShapeError
from revnet_core.errors import UnknownModelError as UnknownModelError
from revnet_core.errors import UnsupportedError as UnsupportedError
from revnet_core.networks import check_channels as check_channels
from revnet_core.networks import check_depth as check_depth
from revnet_core.networks import create_model as create_model
from revnet_core.networks import list_models as list_models
from revnet_core.precision import Precision as Precision
from revnet_core.sequence import ACTIVATIONS as ACTIVATIONS
from revnet_core.sequence import ReversibleSequence as ReversibleSequence
