"""Whether to use a solver, in one sentence that is the same wherever it is read."""

from dataclasses import dataclass

from ..measure.equivalent import Equivalent
from ..measure.evaluate import Row, Summary


@dataclass(frozen=True)
class Verdict:
    """
    Args:
        num_steps (`int`): Of the solver.
        use (`bool`): Whether it is better than the best of diffusers' schedulers at its best setting.
        sentence (`str`): What was found, and what to do.
    """

    num_steps: int
    use: bool
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def verdict_of(num_steps: int, summary: Summary, equivalent: Equivalent | None, improved: bool) -> Verdict:
    """
    Args:
        summary: What was measured.
        equivalent (*optional*): In how many steps the best of diffusers is as near.
        improved (`bool`): Whether searching has improved on what was known.
    """
    best, contest = summary.diffusers, summary.diffusers.contest
    low, high = contest.ratio_interval
    beside = (
        f"{contest.ratio:.2g} times the error of {_named(best)} in {num_steps}, "
        f"95 % interval {low:.2g} to {high:.2g}, nearer on {contest.nearer:.0%}"
    )
    if summary.own is not None and summary.own is not best:
        beside += f"; {summary.own.contest.ratio:.2g} times that of the pipeline's own scheduler"
    if not improved:
        told = f"searching has not improved on what is known: this is the best known table ({beside})"
        return Verdict(num_steps, False, f"{num_steps} steps: {told}.")
    if contest.may_be_better:
        near = f"{equivalent} steps" if equivalent is not None else f"{_named(best)} or nearer"
        return Verdict(num_steps, True, f"{num_steps} steps: as close to the teacher as {near}; use it ({beside}).")
    return Verdict(
        num_steps, False, f"{num_steps} steps: not closer to the teacher than {_named(best)}; use that ({beside})."
    )


def _named(row: Row) -> str:
    return f"{row.solver} ({row.setting})" if row.setting else row.solver
