"""The model card of a finished search, made from its report alone."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from diffusers_searched_solver.hub import TAG
from diffusers_searched_solver.serialization import write_whole

from ..measure.evaluate import SEARCHED, Row
from ..measure.image_metrics import COLUMNS, columns_of
from .record import Report


TEMPLATE = "card_template.md"
CARD, IMAGES = "README.md", "images.png"
# What would be more than itself in Markdown or HTML, wherever in a line it stands.
MARKUP = re.compile(r"[\\`*_\[\]{}<>#!|&~$^:@]")


def check_place(folder: Path) -> None:
    """
    Find before a search whether its card would overwrite what is not a card.

    Raises:
        ValueError: If there is a `README.md` that no search has written.
    """
    path = folder / CARD
    if path.exists() and f"\n- {TAG}\n" not in path.read_text(errors="replace"):
        raise ValueError(f"'{path}' is no search's and would be overwritten. Choose another --output-dir, or move it.")


def write_card(folder: Path, name: str) -> None:
    """
    Write the model card, `README.md`, beside the `report.json` that it is made from.

    Args:
        folder: Where they are.
        name (`str`): What `SearchedSolverScheduler.from_pretrained` finds the solver by: a repository or a folder.
    """
    report = Report.read(folder)
    has_images = (folder / IMAGES).exists()
    metadata = ModelCardData(
        library_name="diffusers",
        license=report.license,
        base_model=report.base_model,
        # It is used with its base model, not in its place.
        base_model_relation="adapter" if report.base_model else None,
        tags=[TAG, "scheduler"],
        model_name=_title(name),
        eval_results=[
            each for n, rows in report.evaluation.results.items() for each in _eval_results(n, rows, report)
        ],
    )
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{_text(report, name, has_images)}")
    write_whole(folder / CARD, str(card).encode(errors="backslashreplace"))


def _eval_results(num_steps: int, rows: Sequence[Row], report: Report) -> list[EvalResult]:
    """The searched solver's error, and its ratios to the rivals', as a card's metadata has them."""
    evaluation = report.evaluation
    found = []
    for row in sorted(rows, key=lambda row: row.solver != SEARCHED):
        if row.contest is None:
            name, kind, value, interval = "End-point error", "endpoint_error", row.endpoint_error, row.error_interval
        else:
            name, kind = f"Error / {row.solver}'s", "error_ratio"
            value, interval = row.contest.ratio, row.contest.ratio_interval
        # A rival may diverge; the Hub's format has finite numbers only.
        if math.isfinite(value):
            result = EvalResult(
                task_type="other",
                task_name="Few-step sampling",
                dataset_type="noise",
                dataset_name=f"{row.num_samples} noises that the search has not seen",
                dataset_config=f"{num_steps} steps",
                dataset_args={"seed": report.seed, "teacher_steps": evaluation.teacher_steps},
                metric_type=kind,
                metric_name=name,
                metric_value=value,
                metric_args={"interval_95": list(interval)},
            )
            found.append(result)
    return found


def _text(report: Report, name: str, has_images: bool) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        finalize=_escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": _number, "share": "{:.0%}".format, "code": _code, "metric_title": COLUMNS.get}
    metrics, results = report.evaluation.image_metrics, report.evaluation.results
    return environment.get_template(TEMPLATE).render(
        report=report,
        results=results,
        metrics=metrics,
        columns=[] if metrics is None else columns_of([row for rows in metrics.results.values() for row in rows]),
        summary=report.summaries,
        verdicts=report.verdicts,
        title=_title(name),
        step_counts=_listed(results),
        usage=report.usage(name, report.recommended or min(results), has_images),
        name=name,
        has_images=has_images,
    )


def _title(name: str) -> str:
    return Path(name).resolve().name


def _listed(numbers: Sequence[int]) -> str:
    *head, last = map(str, numbers)
    return f"{', '.join(head)} and {last}" if head else last


def _escaped(value) -> Markup:
    """A value as Markdown that shows it: nothing in it is markup, and it stays on its line."""
    return value if isinstance(value, Markup) else Markup(MARKUP.sub(r"\\\g<0>", " ".join(str(value).split())))


def _number(value: float) -> str:
    return f"{value:#.3g}".removesuffix(".")


def _code(text: str, language: str) -> Markup:
    """A block of code, between fences that its content cannot end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{text}\n{fence}")
