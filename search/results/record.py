"""Report: everything that a search and its measurement have found, as `report.json` has it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from diffusers_searched_solver import SearchedSolver, pipelines

from ..known.contest import Number
from ..measure.evaluate import Summary
from ..measure.measuring import Evaluation
from .verdict import Verdict, verdict_of


NAME = "report.json"


@dataclass(frozen=True)
class Cost:
    """
    What the search for one step count took.

    Args:
        network_calls (`int`): Of all processes, guidance and the teacher's included.
        seconds (`float`): On the wall.
    """

    network_calls: int
    seconds: float


@dataclass(frozen=True)
class SearchRecord:
    """
    What a search did.

    Args:
        command (`str`): Which began it.
        fitter (`str`): "gauss-newton" or "gradient".
        num_samples (`int`): Noises that were fitted to.
        teacher_steps (`int`): Of the teacher that was fitted to; `least_teacher_steps` were asked for.
        teacher_error (`float`): Its own, as a few noises show.
        teacher_network_calls (`int`): What it cost.
        calls_per_evaluation (`float`): Network calls of one evaluation of one sample, guidance included.
        hard_noises (`bool`): Whether a few noises are much harder than others.
        verdicts, improved: By number of steps, what judging came to, and whether the solver is better than what was
            known; if not, it is the best known table.
        tuned: By number of steps, family and setting of known tables that may be the best, best first.
        costs: By number of steps.
        peak_memory_over_inference (`float`): Peak memory over that of sampling the same batch.
    """

    command: str
    fitter: str
    num_samples: int
    teacher_steps: int
    least_teacher_steps: int
    teacher_error: Number
    teacher_network_calls: int
    calls_per_evaluation: float
    hard_noises: bool
    verdicts: dict[int, str]
    improved: dict[int, bool]
    tuned: dict[int, list[tuple[str, str]]]
    costs: dict[int, Cost]
    peak_memory_over_inference: float

    @property
    def network_calls(self) -> int:
        """For all step counts; the teacher's are shared."""
        return sum(each.network_calls for each in self.costs.values()) - self.teacher_network_calls * (
            len(self.costs) - 1
        )


@dataclass(frozen=True)
class Report:
    """
    What there is to be said of a pipeline's solvers.

    Args:
        pipeline (`str`): As the command line names it.
        pipeline_class (`str`): Of diffusers, or of this package.
        base_model (`str`, *optional*): Its Hub repository.
        license (`str`): Of the solvers.
        example (`dict`): Keyword arguments of a call that makes one sample.
        guidance_scale: One, several, or None for the pipeline's own.
        conditions (`int`): How many were sampled in turn.
        dtype (`str`): Of the networks.
        seed (`int`): Of all noises.
        processes (`int`): Of the launch.
        versions (`dict`): Of packages.
        search (*optional*): What the search did; None if the solvers come from elsewhere.
        evaluation (*optional*): What they are worth; None if they were not measured.
        pictures (`bool`): Whether pictures were drawn, if the pipeline makes any.
        seconds_per_image: By number of steps, what an image took with the searched solver as they were drawn.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    pipeline: str
    pipeline_class: str
    base_model: str | None
    license: str
    example: dict[str, Any]
    guidance_scale: float | list[float] | None
    conditions: int
    dtype: str
    seed: int
    processes: int
    versions: dict[str, str]
    search: SearchRecord | None = None
    evaluation: Evaluation | None = None
    pictures: bool = False
    seconds_per_image: dict[int, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """Text with finite numbers only; null stands for infinity."""
        return _adapter().dump_json(self, indent=2, fallback=repr).decode() + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = NAME) -> "Report":
        """
        Raises:
            ValueError: If this is no report, or one of another version.
        """
        try:
            return _adapter().validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "its beginning"
            raise ValueError(
                f"'{name}' is no report of a search, or of another version of this package: {place}: {first['msg']}. "
                "Choose another --output-dir, or measure the solver once more with --evaluate-only --solver."
            ) from error

    @classmethod
    def read(cls, folder: Path) -> "Report | None":
        """The report in a folder, if there is one."""
        path = folder / NAME
        return cls.from_json(path.read_text(), str(path)) if path.exists() else None

    @property
    def summaries(self) -> dict[int, Summary]:
        """By number of steps, what a reader asks for first."""
        return {n: Summary.of(rows) for n, rows in self.evaluation.results.items()}

    @property
    def verdicts(self) -> dict[int, Verdict]:
        """By number of steps, whether to use it."""
        improved = {} if self.search is None else self.search.improved
        return {
            n: verdict_of(n, summary, self.evaluation.equivalents.get(n), improved.get(n, True))
            for n, summary in self.summaries.items()
        }

    @property
    def recommended(self) -> int | None:
        """The step count that gains most over the best of diffusers, of those that are worth using."""
        used = [n for n, verdict in self.verdicts.items() if verdict.use]
        equivalents = self.evaluation.equivalents
        gains = {n: equivalents[n].num_steps / n if n in equivalents else 1.0 for n in used}
        return max(used, key=gains.get, default=None)

    def usage(self, name: str, num_steps: int, has_images: bool) -> str:
        """
        Python code that draws a sample as the search did.

        Args:
            name (`str`): What `SearchedSolverScheduler.from_pretrained` finds the solver by.
            has_images (`bool`): Whether the pipeline makes images.
        """
        cls = self.pipeline_class
        package = "diffusers_searched_solver.pipelines" if hasattr(pipelines, cls) else "diffusers"
        arguments = "".join(f"{key}={value!r}, " for key, value in self.example.items())
        return (
            f"from {package} import {cls}\n"
            "from diffusers_searched_solver import SearchedSolverScheduler\n\n"
            f"pipe = {cls}.from_pretrained({self.base_model or self.pipeline!r})\n"
            f"pipe.scheduler = SearchedSolverScheduler.from_pretrained({name!r})\n"
            f"{'image' if has_images else 'output'} = pipe({arguments}num_inference_steps={num_steps})"
            f"{'.images[0]' * has_images}"
        )

    @property
    def provenance(self) -> dict[str, str]:
        """How solvers came to be, as their file says it."""
        scale = self.guidance_scale
        found = {
            "base_model": self.pipeline,
            "license": self.license,
            "guidance_scale": "the pipeline's default" if scale is None else str(scale).strip("[]"),
            "dtype": self.dtype,
            "fitter": self.search.fitter,
            "teacher": f"{self.search.teacher_steps} steps",
        }
        if self.evaluation is None:
            return found
        errors = {n: summary.searched.endpoint_error for n, summary in self.summaries.items()}
        return {**found, "endpoint_errors": _adapter_of(dict[int, Number]).dump_json(errors).decode()}

    def joined(self, earlier: "Report") -> "Report":
        """This report with the step counts that only an earlier one of the same settings has."""
        search = replace(
            self.search, **_joined(earlier.search, self.search, ("verdicts", "improved", "tuned", "costs"))
        )
        evaluation = self.evaluation
        if evaluation is not None and earlier.evaluation is not None:
            names = ("results", "equivalents", "trajectories")
            evaluation = replace(evaluation, **_joined(earlier.evaluation, evaluation, names))
        return replace(self, search=search, evaluation=evaluation)


@dataclass(frozen=True)
class Earlier:
    """
    What an earlier search has left in a folder.

    Args:
        report (*optional*): Its own.
        solvers: By number of steps.
    """

    report: Report | None = None
    solvers: dict[int, SearchedSolver] = field(default_factory=dict)


def _joined(earlier, later, names) -> Mapping[str, dict]:
    return {name: dict(sorted({**getattr(earlier, name), **getattr(later, name)}.items())) for name in names}


@cache
def _adapter_of(kind) -> TypeAdapter:
    return TypeAdapter(kind)


def _adapter() -> TypeAdapter:
    """Made when it is first used: pydantic looks at all of the classes above."""
    return _adapter_of(Report)
