"""A search from a prepared pipeline to its files: what the command line and Python callers share."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version

from accelerate import PartialState
from diffusers import DiffusionPipeline
from pydantic import TypeAdapter

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler

from .fit.budget import allowed_calls, check_calls
from .fit.find import given_solvers
from .fit.outcome import Outcome
from .fit.problem import Problem, search_problem
from .fit.strategy import fit_solver, judge_solver
from .gradient.differentiable_network import DifferentiableNetwork
from .gradient.recipe import Recipe, fit_by_gradient, recipe_teacher
from .known.baselines import KnownTable, in_one_kind
from .launch.journal import Journal
from .launch.network_calls import NetworkCalls
from .launch.processes import agree
from .launch.progress import DRAWING, IMAGES, MEASURING, TEACHER, Finding, Progress
from .measure.evaluate import SEARCHED
from .measure.feature_network import FeatureNetwork
from .measure.image_metrics import ImageMetrics, format_metrics, measure_images
from .measure.measuring import Evaluation, Measurement, final_numbers
from .pipeline.field import PipelineField
from .pipeline.loading import hub_repository
from .pipeline.readying import device_of
from .results.output import draw, how_to_use, write_results, write_solvers
from .results.record import Cost, Earlier, Report, SearchRecord
from .settings import Settings
from .teacher.batches import Teacher
from .teacher.cache import TeacherCache, content_key
from .teacher.memory import inference_memory, peak_memory
from .teacher.splits import TRAIN_SEEDS, split_seeds


# What a journal's outcomes depend on.
OF_JOURNAL = (
    "pipeline", "variant", "revision", "lora", "custom_pipeline", "quantization", "num_steps", "class_labels",
    "all_prompts", "guidance_scale", "sizes", "of_every_call", "measure", "num_eval_samples",
    "image_metrics", "feature_network", "num_samples", "teacher_steps", "fitter", "start_solver", "max_calls",
    "batch_size", "mixed_precision", "seed",
)  # fmt: skip
# Measuring may take this share of the search's network calls.
MEASURING_SHARE = 0.5
# Updates of the gradient fitter from one line to the next.
UPDATES_PER_LINE = 50
PACKAGES = "diffusers-searched-solver", "diffusers", "torch"


def heading(pipe: DiffusionPipeline, conditions: Sequence[Mapping], settings: Settings) -> Report:
    """A report without what is found."""
    return Report(
        pipeline=settings.pipeline,
        pipeline_class=type(pipe).__name__,
        base_model=settings.base_model or hub_repository(settings.pipeline),
        license=settings.license,
        # Media as the paths that were given.
        example={**conditions[0], **{k: v for k, v in settings.call_kwargs.items() if isinstance(v, str | list)}},
        guidance_scale=settings.scale,
        conditions=len(conditions),
        dtype=str(getattr(pipe, "dtype", "torch.float32")).removeprefix("torch."),
        seed=settings.seed,
        processes=PartialState().num_processes,
        versions={name: version(name) for name in PACKAGES},
    )


class Session:
    """
    One run of the command line.

    Args:
        pipe, conditions: What is searched for, and keyword arguments of its call that make one sample each.
        settings: Of everything.
        command (`str`): Which the report names.
        network (*optional*): What images are compared by.
        progress: Is told of all of it.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        conditions: Sequence[Mapping],
        settings: Settings,
        command: str,
        network: FeatureNetwork | None,
        progress: Progress,
    ):
        self.pipe, self.conditions, self.network = pipe, conditions, network
        self.command, self.progress = command, progress
        self.calls = NetworkCalls(pipe, progress.update)
        self.settings = settings
        cache = TeacherCache(settings.cache_dir)
        self.teacher = Teacher(pipe, settings.teacher_steps, settings.batch_size, self.calls, cache)
        self._journal = settings.output_dir / "journal.jsonl"

    def search(self, report: Report, earlier: Earlier) -> Report:
        """Search the step counts that are still missing, measure, write, draw."""
        settings = self.settings
        given = given_solvers(
            self.pipe, settings.start_solver and SearchedSolverScheduler.from_pretrained(settings.start_solver)
        )
        of_journal = {name: getattr(settings, name) for name in OF_JOURNAL}
        of_journal |= {name: version(name) for name in PACKAGES}
        journal = Journal(self.calls, self._journal, of_journal, settings.resume)
        if journal.num_resumed:
            self.progress.write(f"{journal.num_resumed} pieces of work are taken over from the run before.")
        outcomes, record = self._searched(earlier, given, journal)
        report = replace(report, search=record)
        solvers = {n: outcome.solver for n, outcome in outcomes.items()}
        if settings.measure != "none":
            tuned = {n: outcome.tuned for n, outcome in outcomes.items()}
            report = replace(report, evaluation=self._measured(report, solvers, tuned, journal))
        if earlier.report is not None:
            report, solvers = report.joined(earlier.report), dict(sorted({**earlier.solvers, **solvers}.items()))
        self._write(report, solvers, report.provenance)
        journal.delete()
        return self._drawn(report, solvers)

    def evaluate(
        self,
        report: Report,
        solvers: Mapping[int, SearchedSolver],
        provenance: Mapping[str, str] | None,
        tuned: Mapping[int, Sequence[KnownTable]] | None,
    ) -> Report:
        """
        Measure solvers without searching.

        Args:
            report: With the search that found them, if there was one here.
            provenance (*optional*): Where they come from otherwise.
            tuned (*optional*): The best known tables as that search has found them.
        """
        report = replace(report, evaluation=self._measured(report, solvers, tuned, Journal(self.calls)))
        self._write(report, solvers, report.provenance if provenance is None else provenance)
        return self._drawn(report, solvers)

    def finish(self, earlier: Earlier) -> Report:
        """Draw what a finished search has not drawn, and say if there is nothing to do."""
        if PartialState().is_main_process:
            # Of a search that was killed just before it would have deleted it.
            self._journal.unlink(missing_ok=True)
        if earlier.report.pictures or earlier.report.evaluation is None:
            place = self.settings.output_dir
            self.progress.write(f"The search in '{place}' is finished: there is nothing to go on with.")
            return earlier.report
        return self._drawn(earlier.report, earlier.solvers)

    def _searched(
        self, earlier: Earlier, given: Mapping[int, SearchedSolver], journal: Journal
    ) -> tuple[dict[int, Outcome], SearchRecord]:
        """The outcomes by number of steps; in the folder are ever better solvers meanwhile."""
        settings, outcomes, costs = self.settings, {}, {}
        memory = inference_memory(self.pipe, self.conditions[0], settings.batch_size)
        self.progress.begin(TEACHER)
        if settings.fitter == "gradient":
            journal.check(self._fingerprint())
        started = time.perf_counter()
        problem = search_problem(self.teacher, self.conditions, settings.num_steps, settings.seed)
        if settings.fitter == "gauss-newton":
            check_calls(problem, settings.num_steps, settings.max_calls)
            journal.check(problem.fingerprint())
        seconds = time.perf_counter() - started
        for num_steps in settings.num_steps:
            self.progress.begin(f"{num_steps} steps")
            before, started, own = journal.spent, time.perf_counter(), problem.anew()
            known = {**earlier.solvers, **{n: outcome.solver for n, outcome in outcomes.items()}, **given}
            for outcome in self._steps(own, num_steps, known, journal):
                new = num_steps not in outcomes or outcome.solver is not outcomes[num_steps].solver
                outcomes[num_steps] = outcome
                if new and PartialState().is_main_process:
                    solvers = {**earlier.solvers, **{n: each.solver for n, each in outcomes.items()}}
                    write_solvers(self.pipe, solvers, settings.output_dir, {"base_model": settings.pipeline})
            self.progress.write(outcomes[num_steps].verdict)
            costs[num_steps] = Cost(
                own.charged + journal.spent - before, round(time.perf_counter() - started + seconds, 2)
            )
        problem.close()
        return outcomes, self._record(problem, outcomes, costs, peak_memory(device_of(self.pipe)) / memory)

    def _record(self, problem: Problem, outcomes: Mapping[int, Outcome], costs, memory: float) -> SearchRecord:
        settings = self.settings
        return SearchRecord(
            command=self.command,
            fitter=settings.fitter,
            num_samples=problem.train.made if settings.fitter == "gauss-newton" else settings.num_samples,
            teacher_steps=problem.teacher_steps,
            least_teacher_steps=settings.teacher_steps,
            teacher_error=problem.teacher_error,
            teacher_network_calls=problem.calls,
            calls_per_evaluation=problem.calls_per_evaluation,
            hard_noises=problem.heavy,
            verdicts={n: outcome.verdict for n, outcome in outcomes.items()},
            improved={n: outcome.improved for n, outcome in outcomes.items()},
            tuned={n: [(table.family, table.setting) for table in each.tuned] for n, each in outcomes.items()},
            costs=costs,
            peak_memory_over_inference=memory,
        )

    def _steps(
        self,
        problem: Problem,
        num_steps: int,
        known: Mapping[int, SearchedSolver],
        journal: Journal,
    ) -> Iterator[Outcome]:
        """Ever better outcomes for one step count, by either fitter."""
        if self.settings.fitter == "gauss-newton":
            budget = allowed_calls(problem, num_steps, self.settings.max_calls)
            return fit_solver(problem, num_steps, budget, journal, self.progress.found, known)
        return self._by_gradient(problem, num_steps, journal)

    def _by_gradient(self, problem: Problem, num_steps: int, journal: Journal) -> Iterator[Outcome]:
        settings = self.settings
        first_seed = split_seeds(settings.seed, TRAIN_SEEDS, 1)[0]
        network = DifferentiableNetwork(self.pipe, self.conditions, settings.batch_size, self.calls, first_seed)
        recipe = Recipe(num_samples=settings.num_samples, teacher_steps=settings.teacher_steps)
        updates = fit_by_gradient(network, num_steps, recipe, journal.remember)
        before = journal.spent
        for update, iteration in enumerate(updates, 1):
            if update % UPDATES_PER_LINE == 0:
                numbers = {"loss": iteration.loss, "network calls": journal.spent - before}
                self.progress.found(Finding(num_steps, f"{iteration.num_samples:,} noises", numbers))
        yield judge_solver(problem, in_one_kind(iteration.solver), journal, self.progress.found)

    def _fingerprint(self) -> str:
        """What the network makes of the first noise."""
        seeds = split_seeds(self.settings.seed, TRAIN_SEEDS, 1)
        field = PipelineField(self.pipe, self.conditions[0], seeds, self.calls)
        fingerprint = content_key(field, recipe_teacher(field.process, self.settings.teacher_steps))
        field.close()
        return fingerprint

    def _measured(self, report: Report, solvers, tuned, journal: Journal) -> Evaluation:
        settings, search = self.settings, report.search
        budget = float("inf")
        if search is not None:
            budget = MEASURING_SHARE * search.network_calls / search.calls_per_evaluation
        self.progress.begin(MEASURING)
        teacher = self.teacher if search is None else replace(self.teacher, steps=search.teacher_steps)
        how = settings.measure == "full", settings.num_eval_samples, budget
        measurement = Measurement(teacher, self.conditions, settings.seed, *how, journal, self.progress)
        tuned = measurement.tune(list(solvers)) if tuned is None else tuned
        error = None if search is None else search.teacher_error
        evaluation = measurement.evaluate(solvers, tuned, error, self.command)
        if self.network is not None:
            self.progress.begin(IMAGES)
            images = TypeAdapter(ImageMetrics).validate_python(
                journal.remember(lambda: agree(self._images(solvers, tuned, evaluation)))
            )
            evaluation = replace(evaluation, image_metrics=images)
            for n, rows in images.results.items():
                self.progress.write(f"\n{n} steps, {images.num_samples} images\n{format_metrics(rows)}")
        self.progress.track(final_numbers(evaluation))
        return evaluation

    def _images(self, solvers, tuned, evaluation: Evaluation) -> dict | None:
        best = {n: {(row.solver, row.setting) for row in rows} for n, rows in evaluation.results.items()}
        samplers = {
            n: {SEARCHED: solver}
            | {each.family: each.solver for each in tuned[n] if (each.family, each.setting) in best[n]}
            for n, solver in solvers.items()
        }
        # Ends of so many are not kept.
        teacher = Teacher(self.pipe, evaluation.teacher_steps, self.settings.batch_size, self.calls)
        found = measure_images(teacher, self.conditions, samplers, self.network, self.settings.of_images)
        return None if found is None else asdict(found)

    def _write(self, report: Report, solvers, provenance: Mapping[str, str]):
        if PartialState().is_main_process:
            write_results(self.pipe, solvers, report, self.settings.output_dir, provenance)
            for verdict in report.verdicts.values() if report.evaluation is not None else ():
                self.progress.write(str(verdict))
            self.progress.write(how_to_use(self.settings.output_dir))

    def _drawn(self, report: Report, solvers) -> Report:
        """The report with pictures, which the main process draws."""
        if report.evaluation is None:
            return report
        self.progress.begin(DRAWING)
        report = replace(report, pictures=True)
        if PartialState().is_main_process:
            each = 1 if report.search is None else report.search.calls_per_evaluation
            settings, update = self.settings, lambda n: self.progress.update(round(each * n))
            of_drawing = settings.output_dir, settings.batch_size, update
            told, report = draw(self.pipe, self.conditions, solvers, report, *of_drawing)
            self.progress.write(told)
        return report
