"""Few-step sampling for diffusers pipelines with solvers that were searched instead of derived."""

# diffusers looks for this name in the package that a pipeline's model_index.json points at.
from diffusers import SchedulerMixin

from .check import Comparison, check_solver
from .configs import process_from_config
from .grids import time_grid
from .hub import list_hub_solvers
from .loading import list_bundled_solvers
from .merging import merge_solver_files
from .process import FlowMatching, NoiseProcess, VariancePreserving
from .scheduler import SearchedSolverScheduler
from .serialization import SolverFile, SolverFileError, load_solver_file, save_solver_file
from .solver import SearchedSolver, tensor_step
from .tabulate import solver_from_scheduler


# So that saved pipelines name the package and not a private module.
SearchedSolverScheduler.__module__ = __name__

__all__ = [
    "Comparison",
    "FlowMatching",
    "NoiseProcess",
    "SchedulerMixin",
    "SearchedSolver",
    "SearchedSolverScheduler",
    "SolverFile",
    "SolverFileError",
    "VariancePreserving",
    "check_solver",
    "list_bundled_solvers",
    "list_hub_solvers",
    "load_solver_file",
    "merge_solver_files",
    "process_from_config",
    "save_solver_file",
    "solver_from_scheduler",
    "tensor_step",
    "time_grid",
]
