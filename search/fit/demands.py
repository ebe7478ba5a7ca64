"""What the cost of a search depends on, known before it begins but for what it is to find out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from accelerate import PartialState
from diffusers import DiffusionPipeline

from diffusers_searched_solver import SearchedSolverScheduler

from ..launch.processes import agree
from ..pipeline.conditions import one_of_each
from ..pipeline.field import NetworkCalls, PipelineField


# Below this evenness a few noises are much harder than others. Then there are so many times as many noises and calls,
# and so many times as many again that judge.
HEAVY = 0.55
HEAVY_FACTOR, HEAVY_JUDGES, HEAVY_CALLS = 2, 2, 3.0


@dataclass(frozen=True, kw_only=True)
class Demands:
    """
    What the cost of a search depends on.

    Args:
        config: Of the pipeline's scheduler.
        prediction_type: Of the pipeline.
        num_variants (`int`): Guidance scales and sizes that the solver has to serve.
        elements (`int`): Of a sample's state; the mean over sizes.
        calls_per_evaluation (`float`): Network calls of one evaluation of one sample, guidance included; the mean over
            guidance scales and sizes.
        teacher_steps (`int`): Of the run whose ends are the goal.
        evenness (`float`): How many noises of one hardness would be worth as much as one: one if all are of one.
    """

    config: Mapping
    prediction_type: str
    num_variants: int
    elements: int
    calls_per_evaluation: float
    teacher_steps: int
    evenness: float

    @property
    def heavy(self) -> bool:
        """Whether a few noises are much harder than others."""
        return self.evenness < HEAVY

    @property
    def offsets(self) -> bool:
        """Whether network times are searched too; where velocities are predicted they are redundant."""
        return self.prediction_type != "flow_prediction"

    @property
    def factor(self) -> int:
        """How many times as many noises as usual a search has."""
        return self.num_variants * (HEAVY_FACTOR if self.heavy else 1)

    @property
    def judges_factor(self) -> int:
        """The same of the noises that judge."""
        return self.factor * (HEAVY_JUDGES if self.heavy else 1)


def usual_demands(
    pipe: DiffusionPipeline, conditions: Sequence[Mapping], teacher_steps: int, calls: NetworkCalls
) -> Demands:
    """What a search demands if its teacher is good enough and no noises are much harder than others: the least."""
    num_variants = len(one_of_each(conditions))
    elements, per_evaluation = agree(_opened(pipe, conditions, calls) if PartialState().is_main_process else None)
    return Demands(
        config=pipe.scheduler.config,
        prediction_type=SearchedSolverScheduler.from_config(pipe.scheduler.config).config.prediction_type,
        num_variants=num_variants,
        elements=elements // num_variants,
        calls_per_evaluation=per_evaluation / num_variants,
        teacher_steps=teacher_steps,
        evenness=1.0,
    )


def _opened(pipe: DiffusionPipeline, conditions: Sequence[Mapping], calls: NetworkCalls) -> tuple[int, int]:
    """Elements of a sample's state, and network calls of its evaluation: sums over guidance scales and sizes."""
    elements, before = 0, calls.count
    for condition in one_of_each(conditions):
        field = PipelineField(pipe, condition, [0], calls)
        elements += field.shape.numel()
        field.close()
    return elements, calls.count - before
