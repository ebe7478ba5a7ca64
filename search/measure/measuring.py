"""The measurement of solvers, on noises that no search has seen."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from accelerate import PartialState

from diffusers_searched_solver import SearchedSolver, solver_from_scheduler
from diffusers_searched_solver.check import FINALISTS
from diffusers_searched_solver.rivals import diffusers_schedulers
from diffusers_searched_solver.teacher import teacher_solver

from ..known.baselines import CLASSICAL, KnownTable, known_tables
from ..known.contest import Number
from ..known.race import race, race_errors, rivals
from ..launch.journal import Journal
from ..launch.processes import agree, in_order
from ..launch.progress import Progress
from ..pipeline.noises import portion_end
from ..pipeline.rollout import Batch, rollout, root_mean_square, sample_errors
from ..teacher.batches import TEACHER_SHARE, Samples, Teacher, count_batches, in_parts, open_field, pipeline_calls
from ..teacher.splits import EVALUATION_SEEDS, TUNING_SEEDS, make_noises, split_seeds, turned
from .equivalent import TIMES, Equivalent, equivalent, farther_tables
from .evaluate import OWN, SEARCHED, Comparison, Row, format_table
from .image_metrics import ImageMetrics
from .trajectory import TrajectoryRow, compare_trajectories, teacher_trajectory


logger = logging.getLogger(__name__)

# Where the rounds end; from the second on it may be clear who is better.
ROUNDS = (8, 16, 32, 64, 128, 256)
# The teacher of a full measurement is this much finer than the one that is fitted to.
FINER = 2
# A search makes its teacher's error a tenth of a usual solver's, as far as a few noises show; on others it may be so
# many times as large before it is said.
TEACHER_MARGIN = 2


@dataclass(frozen=True)
class Evaluation:
    """
    What solvers are worth.

    Args:
        command (`str`): Which measured.
        depth (`str`): "auto" or "full", as `Settings.measure`.
        num_samples (`int`): Held-out noises that the searched solvers were measured on.
        teacher_steps (`int`): Of the teacher whose ends are the goal.
        teacher_error (`float`): How far a coarser one ends from it; what solvers are fitted to, they inherit.
        network_calls (`int`): Of all processes, images not counted.
        results: By number of steps the rows of all solvers, best first.
        equivalents: By number of steps, in how many the best of diffusers is as good as the searched solver.
        trajectories: By number of steps, errors along the way.
        image_metrics (*optional*): What images say.
    """

    command: str
    depth: str
    num_samples: int
    teacher_steps: int
    teacher_error: Number
    network_calls: int
    results: dict[int, list[Row]]
    equivalents: dict[int, Equivalent]
    trajectories: dict[int, list[TrajectoryRow]]
    image_metrics: ImageMetrics | None = None


class Measurement:
    """
    How solvers of a pipeline are measured.

    Args:
        teacher: That they were fitted to.
        conditions: Keyword arguments of the pipeline's call that make one sample each, used in turn.
        seed (`int`): As in `Settings`.
        full (`bool`): Whether all rivals are measured on all noises, by a finer teacher.
        num_samples (`int`): Noises at most.
        budget (`float`): Evaluations of one sample at most, but for those of the first two rounds.
        journal: Remembers what was measured.
        progress: Is told.
    """

    def __init__(
        self,
        teacher: Teacher,
        conditions: Sequence[Mapping],
        seed: int,
        full: bool,
        num_samples: int,
        budget: float,
        journal: Journal,
        progress: Progress,
    ):
        self.fitted, self.conditions, self._seed = teacher, conditions, seed
        self.full, self.num_samples, self._left = full, num_samples, budget
        self.journal, self.progress = journal, progress
        self._spent_before, self._tuning_calls = journal.spent, 0
        # Whose ends are the goal.
        self.teacher = replace(teacher, steps=FINER * teacher.steps) if full else teacher

    @property
    def network_calls(self) -> int:
        """Of all processes, so far."""
        return self.journal.spent - self._spent_before + self._tuning_calls

    def evaluate(
        self,
        solvers: Mapping[int, SearchedSolver],
        tuned: Mapping[int, Sequence[KnownTable]],
        teacher_error: float | None,
        command: str,
    ) -> Evaluation:
        """
        Measure solvers beside everything that is known, and say so.

        Args:
            tuned: By number of steps the known tables that may be the best of their family, found on other noises.
            teacher_error (`float`, *optional*): The fitted teacher's own, if a search has found it.
        """
        comparisons = {n: Comparison(solver, self._rivals(tuned[n], n)) for n, solver in solvers.items()}
        equivalents = self._in_rounds(comparisons)
        results = {n: comparison.rows() for n, comparison in comparisons.items()}
        for n, rows in results.items():
            title = f"{n} steps, distance to the end of a teacher of {self.teacher.steps} steps on held-out noises"
            self.progress.write(f"\n{title}\n{format_table(rows)}")
        found = self.journal.remember(lambda: agree(self._along_the_way(comparisons, teacher_error)))
        _warn_of_teacher(found["teacher_error"], self.fitted.steps, results)
        return Evaluation(
            command=command,
            depth="full" if self.full else "auto",
            num_samples=max(row.num_samples for rows in results.values() for row in rows),
            teacher_steps=self.teacher.steps,
            teacher_error=found["teacher_error"],
            network_calls=self.network_calls,
            results=results,
            equivalents=equivalents,
            trajectories={int(n): [TrajectoryRow(**row) for row in rows] for n, rows in found["trajectories"].items()},
        )

    def tune(self, step_counts: Sequence[int]) -> dict[int, list[KnownTable]]:
        """By number of steps the tables that may be the best, on noises that nothing else is measured on."""
        config = self.teacher.pipe.scheduler.config
        noises = make_noises(self.fitted, self.conditions, self._seed, TUNING_SEEDS)
        tables = {n: known_tables(config, n) for n in step_counts}
        standings = {n: race(each, noises, portion_end, self.journal.remember) for n, each in tables.items()}
        noises.close()
        self._tuning_calls += noises.calls
        return {n: rivals(each) for n, each in standings.items()}

    def _rivals(self, tuned: Sequence[KnownTable], num_steps: int) -> list[KnownTable]:
        """These, and the pipeline's own scheduler where it is a table."""
        scheduler = self.teacher.pipe.scheduler
        try:
            own = [KnownTable(OWN, type(scheduler).__name__, solver_from_scheduler(scheduler, num_steps), True)]
        except ValueError as error:
            logger.info(f"The pipeline's own scheduler takes no part: {error}")
            own = []
        return [*own, *tuned]

    def _in_rounds(self, comparisons: Mapping[int, Comparison]) -> dict[int, Equivalent]:
        """
        Measure on ever more noises until it is clear who is better, or there is no budget left; what is best of
        diffusers after the first round is measured in more steps, too, in the second.
        """
        rounds = [*(end for end in ROUNDS if end < self.num_samples), self.num_samples]
        rounds = list(dict.fromkeys((rounds[0], rounds[-1]))) if self.full else rounds
        config, second, equivalents, start = self.teacher.pipe.scheduler.config, min(1, len(rounds) - 1), {}, 0
        for number, stop in enumerate(rounds):
            racing = {n: each for n, each in comparisons.items() if number < 2 or not each.is_decided}
            tables = [each.solvers[name] for each in racing.values() for name in each.racing]
            best = {n: each.rivals[each.best_of_diffusers] for n, each in racing.items()}
            farther = {n: farther_tables(config, table) for n, table in best.items() if number == second}
            more = [table.solver for each in farther.values() for table in each]
            cost = (stop - start) * (self.teacher.steps + sum(table.num_steps for table in tables + more))
            if not racing or not self.full and number > 1 and cost > self._left:
                break
            errors = iter(self._errors(start, stop, tables + more))
            found = {n: {name: next(errors) for name in each.racing} for n, each in racing.items()}
            for n, comparison in racing.items():
                comparison.add(found[n])
                if not self.full:
                    comparison.drop_hopeless()
            for n, those in farther.items():
                of_farther = [(each, next(errors)) for each in those]
                equivalents[n] = equivalent(best[n], found[n][SEARCHED], found[n][str(best[n])], of_farther)
            self._left -= cost
            start = stop
        return {n: each for n, each in equivalents.items() if each is not None}

    def _errors(self, start: int, stop: int, solvers: Sequence[SearchedSolver]) -> torch.Tensor:
        """The errors of solvers on the noises from one number to another, shape (solvers, noises), float64."""
        seeds = split_seeds(self._seed, EVALUATION_SEEDS, stop)[start:]
        conditions = turned(self.conditions, seeds, self._seed, EVALUATION_SEEDS)

        def of_batch(batch: Batch) -> torch.Tensor:
            errors = race_errors(batch, solvers)
            noise, count = batch.field.noise, len(batch.field.seeds)
            batch.field.close()
            # DiTPipeline's states hold every sample twice under guidance: one of them is evidence enough.
            twice = len(noise) == 2 * count and torch.equal(noise[:count], noise[count:])
            return errors[:, :count] if twice else errors

        def compute() -> list:
            num_batches = count_batches(conditions, len(seeds), self.teacher.batch_size)
            found = in_order(self.teacher.stream(conditions, seeds), num_batches, of_batch)
            return torch.cat(list(found), 1).tolist()

        return torch.tensor(self.journal.remember(compute), dtype=torch.float64, device="cpu")

    def _along_the_way(self, comparisons: Mapping[int, Comparison], teacher_error: float | None) -> dict | None:
        """The teacher's error, if it is not known, and trajectories, on the first noises by the main process."""
        if not PartialState().is_main_process:
            return None
        seeds = split_seeds(self._seed, EVALUATION_SEEDS, self.teacher.batch_size)
        samples = pipeline_calls(turned(self.conditions, seeds, self._seed, EVALUATION_SEEDS), seeds, len(seeds))[0]

        def found(samples: Samples, _) -> dict:
            field = open_field(self.teacher.pipe, samples, self.teacher.calls)
            error = teacher_error
            if error is None or self.full:
                ends = (rollout(field, teacher_solver(field.process, n * self.fitted.steps)) for n in (1, FINER))
                error = root_mean_square(sample_errors(*ends))
            trajectory = teacher_trajectory(field, self.teacher.steps)
            rows = {
                n: compare_trajectories(each.solvers[SEARCHED], each.best_of(CLASSICAL).solver, field, trajectory)
                for n, each in comparisons.items()
            }
            field.close()
            return {
                "teacher_error": error,
                "trajectories": {n: [vars(r) for r in each] for n, each in rows.items()},
            }

        return next(in_parts(self.teacher.pipe, found, samples))


def measuring_evaluations(
    config: Mapping, step_counts: Sequence[int], teacher_steps: int, full: bool, num_samples: int, batch_size: int
) -> int:
    """
    Evaluations of one sample that a measurement makes; those of the first two rounds, after which it mostly is clear
    who is better, if it is not full.
    """
    solvers = 3 + len(diffusers_schedulers(config)) + FINALISTS
    noises = num_samples if full else min(num_samples, ROUNDS[1])
    steps = FINER * teacher_steps if full else teacher_steps
    # Most solvers share their first prediction.
    runs = sum((n - 0.5) * solvers for n in step_counts)
    farther = min(num_samples if full else ROUNDS[0], noises) * sum(TIMES) * sum(step_counts)
    along = batch_size * (steps + (3 * teacher_steps if full else 0) + 3 * sum(step_counts))
    return int(noises * (steps + runs) + farther + along)


def final_numbers(evaluation: Evaluation) -> dict[str, float]:
    """The numbers of an evaluation, by names for trackers."""
    errors = {f"{n} steps/endpoint_error/{row.solver}": row.endpoint_error for n, row in _all(evaluation.results)}
    if evaluation.image_metrics is None:
        return errors
    rows = _all(evaluation.image_metrics.results)
    return errors | {f"{n} steps/{name}/{row.solver}": value for n, row in rows for name, value in row.metrics.items()}


def _all(results: Mapping[int, Sequence]) -> list[tuple]:
    return [(n, row) for n, rows in results.items() for row in rows]


def _warn_of_teacher(error: float, teacher_steps: int, results: Mapping[int, Sequence[Row]]):
    """Say if the fitted teacher's own error is not small beside that of the best rival."""
    least = min(row.endpoint_error for _, row in _all(results) if row.solver != SEARCHED)
    if error > TEACHER_MARGIN * TEACHER_SHARE * least:
        logger.warning(
            f"The teacher's own error is {error:.3g}, the least of a rival {least:.3g}: the solver may be fitted to "
            f"the teacher's mistakes. Search again with `--teacher-steps {2 * teacher_steps}`."
        )
