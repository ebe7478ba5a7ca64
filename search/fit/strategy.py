"""The search of a solver: what is known races, the best of different kinds are improved, and one is judged best."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from diffusers_searched_solver import SearchedSolver

from ..known.baselines import CLASSICAL, GIVEN, NEIGHBOUR, known_tables
from ..known.contest import Contest, score
from ..known.race import gathered_weights, race, rivals
from ..launch.journal import Journal
from ..launch.progress import Finding
from ..pipeline.noises import Weights, portion_end
from ..pipeline.rollout import Batch, endpoint_errors, rollout, sample_errors
from .budget import CONFIRMING, LEAST_TRIALS, MOST_JUDGES, TIMES_NOISES, WAYS, Budget
from .gauss_newton import MAX_TRIALS, gauss_newton_iteration
from .outcome import Contender, Outcome
from .parameters import FRAME, ORDER
from .problem import Problem
from .starts import best_of_kinds, given_tables, make_family, shorter, start_grids


# Contenders whose rank is more than this many times the best one's are not worth an iteration; the second where a few
# noises are much harder than others. On a network of galaxies a contender at 1.04 times led to 0.41 of the best of
# diffusers where the best one led to 0.62; of those at 1.4 times and more none was the best in the end.
CLOSE, HEAVY_CLOSE = 1.6, 1.25
# Samples weigh 1 / error of the best known solver, but no more than if it were this share of the usual one.
LEAST_SHARE = 0.01
# Trials of an iteration over node times.
TIMES_TRIALS = 5


def judge_solver(problem: Problem, solver: SearchedSolver, journal: Journal, tell=lambda found: None) -> Outcome:
    """
    The outcome of a search that was made otherwise: the solver, or the best that is known if it is not better.
    Arguments as in `fit_solver`.
    """
    return _Fit(problem, solver.num_steps, np.inf, journal, tell, {}).judge(solver)


def fit_solver(
    problem: Problem,
    num_steps: int,
    max_calls: int,
    journal: Journal,
    tell: Callable[[Finding], None] = lambda found: None,
    given: Mapping[int, SearchedSolver] = {},  # noqa: B006
) -> Iterator[Outcome]:
    """
    Search a solver within a budget.

    1. All known tables race: diffusers' schedulers, classical ones, given ones and those of neighbouring step counts.
    2. Node times of Adams-Bashforth solvers are searched on a few noises, from several grids: few numbers need few
       samples, and from there everything converges where from a classical grid it stalls.
    3. The best of different kinds that are near to the best of all take one iteration over everything.
    4. The best of these takes as many more as there are calls for, each on fresh noises, on twice as many where what
       was fitted does not show on the noises that judge.
    5. More noises judge until the best and the best that was known are told apart. If it is not better, the known one
       is the outcome.

    Where a few noises are much harder than others, all is on more noises, of which more are hard ones. Known tables
    race on these, an iteration is on 32 to 64, half of what it has fitted is judged beside all of it, and in the end
    fresh noises choose between the outcome, solvers on the way to it and the best that was known.

    Args:
        problem, num_steps: What to fit, and N.
        max_calls (`int`): Network calls, those of `problem` included.
        journal, tell: Know what an interrupted search has done already; is told what every stage has found.
        given: By number of steps.

    Yields:
        `Outcome`: Ever better ones; the last is decided.

    Raises:
        ValueError: If the budget is too small for one iteration.
    """
    return _Fit(problem, num_steps, max_calls, journal, tell, given).run()


class _Fit:
    """One call of `fit_solver`."""

    def __init__(self, problem, num_steps, max_calls, journal, tell, given):
        self.problem, self.num_steps, self.budget = problem, num_steps, Budget(problem, num_steps, max_calls)
        self.journal, self.tell, self.start = journal, tell, journal.spent
        self.tables = [*known_tables(problem.config, num_steps), *given_tables(given, problem, num_steps)]
        self.num_judges = self.budget.judges
        self.budget.check(len(self.tables))

    @property
    def left(self) -> float:
        """Evaluations of one sample that there are calls for, but for those that the outcome is confirmed with."""
        spent = self.problem.charged + self.journal.spent - self.start
        return (self.budget.max_calls - spent) / self.problem.calls_per_evaluation - self._confirming

    @property
    def _confirming(self) -> int:
        """Evaluations that are kept for the outcome to be confirmed with."""
        if not self.problem.heavy:
            return 0
        count = self.budget.many(CONFIRMING)
        made = (count - self.problem.confirming.asked) * self.problem.teacher_steps
        return made + count * (1 + len(WAYS)) * self.num_steps

    def run(self) -> Iterator[Outcome]:
        """Search."""
        known = self._raced()
        yield self._found(self.known, "best that is known")
        # Where classical tables lead, node times that are searched first lead farther.
        starts = [each for each in known if not each.name.startswith(CLASSICAL)]
        families = [make_family(self.problem, each.solver) for each in starts]
        starts = [replace(s, family=f, vector=f.start) for s, f in zip(starts, families, strict=True)]
        best = yield from self._improved([*starts, self._staged()])
        yield self._decided(best)

    def judge(self, solver: SearchedSolver) -> Outcome:
        """Judge a solver that was found otherwise."""
        self._raced()
        return self._decided(self._judged(Contender("searched", solver)))

    def _raced(self) -> list[Contender]:
        """The best known tables of different kinds, on the noises that judge."""
        noises = self.problem.judging if self.problem.heavy else self.problem.train
        standings = race(self.tables, noises, self.budget.many, self.journal.remember, self.budget.rungs)
        tables = best_of_kinds(standings, self.problem.judges_factor)
        judged = [(self._judged(Contender(str(table), table.solver)), table) for table in tables]
        # What follows from other step counts is a start, but nothing that anybody knew.
        self.tuned = rivals([each for each in standings if each.table.family not in (GIVEN, NEIGHBOUR)])
        known = [(each, table) for each, table in judged if table.family != NEIGHBOUR]
        self.known, self.best_known = min(known, key=lambda pair: pair[0].error)
        schedulers = sorted((each for each, table in judged if table.from_diffusers), key=self._rank)
        # Of many that are judged where a few noises are much harder than others, one goes on: they are much alike.
        going_on = schedulers[:1] if self.problem.heavy else schedulers
        return [*going_on, *(each for each, table in judged if not table.from_diffusers)]

    def _judged(self, contender: Contender) -> Contender:
        """The same with its errors on the noises that judge."""
        batches = self.problem.judging.between(0, self.num_judges)
        weights = gathered_weights(self.problem.judging, 0, self.num_judges)
        return replace(contender, errors=self._remembered(batches, contender.solver), weights=weights)

    def _remembered(self, batches: Sequence[Batch], solver: SearchedSolver) -> torch.Tensor:
        """The error of every sample of all processes."""
        errors = self.journal.remember(lambda: endpoint_errors(batches, solver).tolist())
        return torch.tensor(errors, dtype=torch.float64, device="cpu")

    def _contest(self, each: Contender) -> Contest:
        return Contest.of(each.errors, self.known.errors, each.weights)

    def _rank(self, each: Contender) -> float:
        return self._contest(each).rank

    def _found(self, best: Contender, stage: str, lenient: bool = False) -> Outcome:
        calls = self.problem.charged + self.journal.spent - self.start
        ratios = {"ratio": self._contest(best).ratio, "geometric mean": self._contest(best).geometric_mean}
        numbers = {"judged error": best.error, **ratios, "network calls": calls}
        self.tell(Finding(self.num_steps, f"{stage} ({best.name})", numbers))
        return self._outcome(best, lenient or not self.problem.heavy)

    def _outcome(self, best: Contender, lenient: bool) -> Outcome:
        contest = self._contest(best)
        better = contest.may_be_better if lenient else contest.is_better
        solver, contest = (best.solver, contest) if better else (self.best_known.solver, None)
        return Outcome(solver, self.best_known, contest, self.num_judges, self.tuned)

    def _iterated(self, contender: Contender, start: int, stop: int, times_only: bool) -> tuple[Contender, float]:
        """A contender after one iteration on some noises, and the share of the loss that is left on them."""
        batches, weights = self.problem.train.between(start, stop), self.problem.train.weights(start, stop)
        noises = stop - start
        spare = max(0, self.left - self.budget.iteration(noises)) // self.budget.trial(noises)
        trials = TIMES_TRIALS if times_only else int(min(LEAST_TRIALS + spare, MAX_TRIALS))

        def compute() -> dict:
            known = self._known_errors(batches, weights)
            settings = contender.family, contender.vector, batches, known, times_only, trials
            try:
                fitted = gauss_newton_iteration(*settings)
            except ValueError as error:
                # The solver differs so little from one without finite ends that it is none itself.
                return {"error": str(error)}
            return {"vector": fitted.vector.tolist(), "loss": fitted.loss}

        found = self.journal.remember(compute)
        if "error" in found:
            self.tell(Finding(self.num_steps, f"{contender.name}: {found['error']}", {}))
            return contender, 1.0
        fitted = replace(contender, vector=np.array(found["vector"]))
        if times_only:
            return fitted.on_the_way((1.0,), contender.vector)[0], found["loss"]
        judged = map(self._judged, fitted.on_the_way(self.budget.shares, contender.vector))
        return min(judged, key=self._rank), found["loss"]

    def _known_errors(self, batches: Sequence[Batch], weights: Weights) -> list[torch.Tensor]:
        """The best known solver's error on every sample of each batch, over what the sample weighs."""
        least, solver = LEAST_SHARE * self.known.error, self.known.solver
        errors = [sample_errors(rollout(batch.field, solver), batch.target) for batch in batches]
        errors = [each.nan_to_num(np.inf, posinf=np.inf).clamp(max(least, 1e-12)) for each in errors]
        return [each / weights.of(batch) for each, batch in zip(errors, batches, strict=True)]

    def _staged(self) -> Contender:
        """Adams-Bashforth on searched node times."""
        moved, noises = [], self.budget.many(TIMES_NOISES)
        batches, weights = self.problem.train.between(0, noises), gathered_weights(self.problem.train, 0, noises)
        for grid in start_grids(self.problem.process, self.num_steps):
            family = make_family(self.problem, SearchedSolver.adams_bashforth(*grid, FRAME, ORDER))
            start = replace(self.known, name="searched node times", family=family, vector=family.start)
            contender, _ = self._iterated(start, 0, noises, times_only=True)
            fitted = self.journal.remember(lambda s=contender.solver: score(endpoint_errors(batches, s), weights))
            moved.append((fitted, contender))
        contender, _ = self._iterated(min(moved, key=lambda pair: pair[0])[1], 0, noises, times_only=True)
        return self._judged(contender)

    def _improved(self, contenders: Sequence[Contender]) -> Iterator[Outcome]:
        """
        The best contender after as many iterations as there are calls for: in each round, those that are close to the
        best take one, on the same noises; in the next there is one of them less.
        """
        best, racing = min([self.known, *contenders], key=self._rank), list(contenders)
        close = HEAVY_CLOSE if self.problem.heavy else CLOSE
        window, repeated = self._affordable(shorter(0, self.budget.first_noises)), False
        while window:
            start, stop = window
            racing = sorted(racing, key=self._rank)
            racing = [each for each in racing if self._rank(each) <= close * self._rank(racing[0])]
            moved, losses = [], []
            for contender in racing:
                # Where a few noises are much harder than others, to have tried another is worth more than a round.
                share = 1 if self.problem.heavy else 2
                if moved and self.budget.iteration(stop - start) > self.left / share:
                    break
                improved, loss = self._iterated(contender, start, stop, times_only=False)
                moved.append(min(contender, improved, key=self._rank))
                losses.append((loss, self._rank(improved) / self._rank(contender)))
                best = min(best, improved, key=self._rank)
                yield self._found(best, f"everything, {stop - start} noises")
            racing = sorted(moved, key=self._rank)[: max(1, len(racing) - 1)]
            # Twice on the same noises is the last resort.
            before, window = window, None if repeated else self._affordable(self._next(start, stop, losses[0]))
            repeated = window == before
        return best

    def _next(self, start: int, stop: int, fitted: tuple[float, float]) -> list[tuple[int, int]]:
        """
        The noises that the next round may be on, the best ones first: at first all from the beginning, then fresh
        ones, and twice as many where half of what was gained on those that were fitted does not show on those that
        judge; or else fewer, or the same again.
        """
        loss, rank = fitted
        # The loss is of squares.
        fits_only = rank > 1 - (1 - np.sqrt(loss)) / 2
        size = self.budget.later_noises
        first = [(0, size)] if stop < size else []
        end = size if first else portion_end(stop + (2 if fits_only else 1) * (stop - start))
        return [*first, *shorter(stop, end), (start, stop)]

    def _affordable(self, windows: Sequence[tuple[int, int]]) -> tuple[int, int] | None:
        """The first of these that there are calls for."""
        for start, stop in windows:
            made = max(0, stop - self.problem.train.asked)
            if self.budget.iteration(stop - start) + made * self.problem.teacher_steps <= self.left:
                return start, stop
        return None

    def _decided(self, best: Contender) -> Outcome:
        """The outcome, with as many noises that judge as it takes to tell the best from the best that was known."""
        if self.problem.heavy:
            return self._confirmed(best)
        while best is not self.known and self.num_judges < self.budget.many(MOST_JUDGES):
            more = portion_end(self.num_judges + 1)
            cost = (more - self.problem.judging.asked) * self.problem.teacher_steps + 2 * more * self.num_steps
            if self._contest(best).is_decided or cost > self.left:
                break
            self.num_judges = more
            best, self.known = map(self._judged, (best, self.known))
        return self._found(best, "decided")

    def _confirmed(self, best: Contender) -> Outcome:
        """
        The outcome where a few noises are much harder than others. What the noises that judge have chosen is better on
        them for having been chosen, and they may have none like the one that others will meet. So fresh ones, as they
        come, choose once: between the best, solvers on the way to it, and the best that was known.
        """
        count = self.budget.many(CONFIRMING)
        batches = self.problem.confirming.between(0, count)
        weights = gathered_weights(self.problem.confirming, 0, count)

        def confirmed(contender: Contender) -> Contender:
            return replace(contender, errors=self._remembered(batches, contender.solver), weights=weights)

        contenders = [] if best is self.known else best.on_the_way(WAYS)
        self.num_judges, self.known = count, confirmed(self.known)
        better = [each for each in map(confirmed, contenders) if self._contest(each).may_be_better]
        chosen = min([self.known, *better], key=lambda each: self._contest(each).rank)
        return self._found(chosen, "confirmed", lenient=True)
