"""The search from Python: a pipeline and its conditions in, a solver and what it is worth out."""

from collections.abc import Callable, Mapping, Sequence

from diffusers import DiffusionPipeline

from diffusers_searched_solver import SearchedSolver, SolverFile
from diffusers_searched_solver.scheduler import SearchedSolverScheduler

from ..launch.journal import Journal
from ..pipeline.field import NetworkCalls
from ..teacher.admission import admit
from ..teacher.batches import BATCH_SIZE, TEACHER_STEPS, Teacher
from .budget import allowed_calls, check_calls
from .demands import usual_demands
from .outcome import Outcome
from .problem import search_problem
from .strategy import fit_solver


def search_solver(
    pipe: DiffusionPipeline, num_steps: int, conditions: Sequence[Mapping], **settings
) -> SearchedSolver:
    """
    Search a solver for a pipeline: what [`find_solver`] finds, without what it says of it.

    Args:
        pipe, num_steps, conditions, settings: As in [`find_solver`].

    Returns:
        `SearchedSolver`: On the noises that judge better than the best known solver by the geometric mean, and by the
            root mean square too or, where no noises are much harder than others, not worse beyond chance and `LITTLE`;
            or else the best known solver itself.

    Example:
        >>> from diffusers_searched_solver.pipelines import ClassToImagePipeline
        >>> pipe = ClassToImagePipeline.from_pretrained("examples/digits-sit")
        >>> conditions = [{"class_labels": [digit], "guidance_scale": 1.0} for digit in range(10)]
        >>> solver = search_solver(pipe, 3, conditions, max_calls=5_000, log=None)
        >>> solver.num_steps, solver.frame, solver.sigmas[[0, -1]].tolist()
        (3, 'velocity', [1.0, 0.0])
    """
    return find_solver(pipe, num_steps, conditions, **settings).solver


def find_solver(
    pipe: DiffusionPipeline,
    num_steps: int,
    conditions: Sequence[Mapping],
    max_calls: int | None = None,
    seed: int = 0,
    teacher_steps: int = TEACHER_STEPS,
    batch_size: int = BATCH_SIZE,
    given: SolverFile | None = None,
    log: Callable[[str], None] | None = print,
) -> Outcome:
    """
    Search a solver for a pipeline by damped Gauss-Newton steps, from the best that is known;
    `gradient.fit_by_gradient` is the paper's way.

    Args:
        pipe (`DiffusionPipeline`): Any pipeline whose noise process its scheduler's config describes.
        num_steps (`int`): Steps of the solver, at least 2.
        conditions: Keyword arguments for the pipeline's call that make one sample each, used in turn, for instance
            `[{"class_labels": [k], "guidance_scale": 2.0} for k in range(10)]` or `[{"prompt": "a cat"}]`.
        max_calls (`int`, *optional*): Network calls, guidance and the teacher included; by default `default_calls`.
            They decide how many noises, starts and iterations there are.
        seed (`int`): Of the noises.
        teacher_steps (`int`): Steps of the run whose end point is the goal, at least; they are doubled until its own
            error is small against that of the solvers.
        batch_size (`int`): Samples in one call of the pipeline.
        given (`SolverFile`, *optional*): Further solvers to begin from, for the same kind of noise process.
        log: Is given lines that say what the search has found so far; None is silent.

    Returns:
        `Outcome`: The solver, and what it is worth.

    Raises:
        ValueError: If an argument is out of range, there is nothing to search with, or `given` is for another process.
        UnsuitableCallError, FieldError: If the pipeline's call fails, or would not do what a searched solver says,
            which is found out first.
    """
    check_settings([num_steps], conditions, teacher_steps, batch_size)
    conditions = admit(pipe, conditions, [num_steps])
    others = given_solvers(pipe, given)
    say = log or (lambda line: None)
    calls = NetworkCalls(pipe)
    problem = None
    try:
        check_calls(usual_demands(pipe, conditions, teacher_steps, calls), [num_steps], max_calls)
        teacher = Teacher(pipe, teacher_steps, batch_size, calls)
        problem = search_problem(teacher, conditions, [num_steps], seed)
        journal, budget = Journal(calls), allowed_calls(problem, num_steps, max_calls)
        *_, outcome = fit_solver(problem, num_steps, budget, journal, lambda found: say(str(found)), others)
        say(outcome.verdict)
        return outcome
    finally:
        calls.remove()
        if problem is not None:
            problem.close()


def check_settings(step_counts, conditions, teacher_steps, batch_size):
    """Refuse settings that no search can run with."""
    if not conditions:
        raise ValueError("`conditions` is empty. Give the keyword arguments of at least one call of the pipeline.")
    # The usual teacher is made finer where it has to be.
    minima = {"batch_size": 1, "teacher_steps": min(2 * max(step_counts), TEACHER_STEPS)}
    given = {"batch_size": batch_size, "teacher_steps": teacher_steps}
    for name, minimum in minima.items():
        if given[name] < minimum:
            raise ValueError(f"`{name}` is {given[name]}, expected at least {minimum}.")
    for num_steps in step_counts:
        if num_steps < 2:
            raise ValueError(f"`num_steps` is {num_steps}, expected at least 2: one step leaves nothing to search.")


def given_solvers(
    pipe: DiffusionPipeline, given: SolverFile | SearchedSolverScheduler | None
) -> dict[int, SearchedSolver]:
    """
    The solvers of a file, or of the scheduler that runs them, carried over to the pipeline's noise process.

    Raises:
        ValueError: If they are for another kind of process, or there are none.
    """
    if given is None:
        return {}
    file = given if isinstance(given, SolverFile) else given.solver_file
    if file is None:
        raise ValueError("The scheduler to start from has no searched solver. Name one that has.")
    return dict(SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=file).solver_file.solvers)
