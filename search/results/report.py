"""The report of a search as one HTML file that needs nothing else: no network, no other file."""

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffusers_searched_solver import NoiseProcess, SearchedSolver, load_solver_file
from diffusers_searched_solver.serialization import SOLVER_FILE

from ..known.baselines import CLASSICAL
from ..measure.evaluate import SEARCHED, Row
from ..measure.image_metrics import COLUMNS
from ..measure.trajectory import CLASSICAL_ORDER, TrajectoryRow, with_classical_coefficients
from .charts import Axis, Chart, Line
from .images import ERROR_GAIN, Film, SampleImages, error_films
from .record import Report


TEMPLATE = "report_template.html"
# Metrics of images, two in a column where a phone would have no room for more.
METRIC_COLUMNS = (("psnr", "ssim"), ("fid", "kid"), ("inception_score", None), ("precision", "recall"))
# Of an image in the report, in pixels, and how long a frame of a video is shown.
MAX_TILE, FRAME_MS = 256, 125
# Of the errors in one chart, from the smallest to the greatest.
MAX_RANGE = 1e5


def write_report(folder: Path, name: str, images: SampleImages | None = None) -> None:
    """
    Write `report.html` beside the `report.json` and the solver file that it is made from.

    Args:
        folder: Where they are.
        name (`str`): What `SearchedSolverScheduler.from_pretrained` will find the solver by.
        images (*optional*): Without them the report has no pictures.
    """
    report = Report.read(folder)
    file = load_solver_file(folder / SOLVER_FILE)
    results = dict(sorted(report.evaluation.results.items()))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = {"number": _number, "signed": _signed, "sha256": _sha256, "metric_title": COLUMNS.get}
    environment.filters |= filters
    html = environment.get_template(TEMPLATE).render(
        report=report,
        results=results,
        verdicts=report.verdicts,
        recommended=report.recommended,
        usage=report.usage(name, report.recommended or min(results), images is not None),
        summary={n: report.summaries[n] for n in results},
        images=None if images is None else _tiles(images),
        error_chart=_error_chart(results),
        process=file.process,
        details={n: _details(file.solvers[n], file.process, report) for n in results},
        classical_order=CLASSICAL_ORDER,
        metric_columns=METRIC_COLUMNS,
    )
    (folder / "report.html").write_text(html, encoding="utf-8")


def _error_chart(results: Mapping[int, Sequence[Row]]) -> Chart:
    """
    Errors against steps: the searched solver, then the rivals, the best at the most steps first. A rival that diverges
    is in the table alone.
    """
    counts = list(results)
    last = sorted(results[counts[-1]], key=lambda row: row.solver != SEARCHED)
    rival = next(row.solver for row in last if row.from_diffusers)
    lines = []
    for name in (row.solver for row in last):
        rows = {n: row for n in counts for row in results[n] if row.solver == name}
        if np.isfinite([row.error_interval for row in rows.values()]).all():
            points = [(n, row.endpoint_error) for n, row in rows.items()]
            intervals = [(n, *row.error_interval) for n, row in rows.items()]
            role = {SEARCHED: "searched", rival: "rival"}.get(name, "other")
            lines.append(Line(name, role, points, intervals))
    lowest = min(low for line in lines for _, low, _ in line.whiskers)
    highest = max(high for line in lines for _, _, high in line.whiskers) or 1.0
    return Chart(
        "End-point error against steps",
        Axis(counts[0] if len(counts) > 1 else counts[0] - 1, counts[-1]),
        Axis(max(lowest / 1.1, highest / MAX_RANGE), highest * 1.1, log=True),
        "steps",
        "end-point error, on a logarithmic scale",
        lines,
        x_values=counts,
        height=24,
    )


def _details(solver: SearchedSolver, process: NoiseProcess, report: Report) -> dict:
    """What the page shows of one solver."""
    trajectories = report.evaluation.trajectories[solver.num_steps]
    time = Axis(process.max_timestep, 0)
    return {
        "schedule": _schedule_chart(trajectories[0].timesteps, process, time),
        "calls": _calls_chart(solver, trajectories, time),
        "trajectory": _trajectory_chart(trajectories, time),
        "heat_maps": _heat_maps(solver),
    }


def _schedule_chart(nodes: Sequence[float], process: NoiseProcess, time: Axis) -> Chart:
    """The searched nodes on the noise scale of the model."""
    timesteps = np.linspace(process.max_timestep, 0, 101)
    alphas, sigmas = process.alpha_sigma(timesteps)
    scales = process.alpha_sigma(nodes)[1]
    stems = [(t, 0, sigma) for t, sigma in zip(nodes, scales, strict=True)]
    return Chart(
        "The model's schedule and the searched nodes on it",
        time,
        Axis(0, 1),
        "timestep",
        "scale of the state's parts",
        [
            Line("nodes", "searched", list(zip(nodes, scales, strict=True)), stems, joined=False),
            Line("noise, sigma", "other", list(zip(timesteps, sigmas, strict=True)), dotted=False),
            Line("signal, alpha", "faint", list(zip(timesteps, alphas, strict=True)), dotted=False),
        ],
        height=13,
    )


def _calls_chart(solver: SearchedSolver, trajectories: Sequence[TrajectoryRow], time: Axis) -> Chart:
    """Where the solver's nodes are, where it calls the network, and where the best classical table has its nodes."""
    classical = next(row for row in trajectories if row.solver == CLASSICAL)
    rows = [
        ("nodes", "searched", trajectories[0].timesteps),
        ("network calls", "searched", solver.timesteps.tolist()),
        ("classical nodes", "other", classical.timesteps),
    ]
    return Chart(
        "Timesteps of the searched nodes, of the network calls and of the best classical table",
        time,
        Axis(len(rows) + 0.5, 0.5),
        "timestep",
        "",
        [
            Line(name, role, [(t, place) for t in timesteps], joined=False)
            for place, (name, role, timesteps) in enumerate(rows, start=1)
        ],
        height=6,
    )


def _trajectory_chart(trajectories: Sequence[TrajectoryRow], time: Axis) -> Chart:
    """Distances to the teacher along the runs."""
    roles = ("searched", "rival", "other")
    return Chart(
        "Distance to the teacher's state at the same noise level",
        time,
        Axis(0, 1.05 * (max(error for row in trajectories for error in row.errors) or 1.0)),
        "timestep",
        "distance to the teacher",
        [
            Line(row.solver, role, list(zip(row.timesteps, row.errors, strict=True)))
            for row, role in zip(trajectories, roles, strict=True)
        ],
        height=16,
    )


def _heat_maps(solver: SearchedSolver) -> list[dict]:
    """The searched coefficients and classical ones on the same nodes: values, row sums and, of 1, shades."""
    tables = {
        "searched": solver.coefficients,
        f"Adams-Bashforth {CLASSICAL_ORDER}": with_classical_coefficients(solver).coefficients,
    }
    strongest = max(abs(table).max() for table in tables.values())
    return [
        {"name": name, "rows": [[(c, abs(c) / strongest) for c in row[: i + 1]] for i, row in enumerate(table)]}
        for name, table in tables.items()
    ]


def _tiles(images: SampleImages) -> dict:
    """Images and their errors as data URIs."""
    samples = {
        num_steps: {
            name: list(zip(_data_uris(row), _data_uris(error_films(row, images.teacher)), strict=True))
            for name, row in rows.items()
        }
        for num_steps, rows in sorted(images.samples.items())
    }
    width, height = images.teacher[0][0].size
    return {
        "captions": [caption or f"sample {k}" for k, caption in enumerate(images.captions, start=1)],
        "teacher_steps": images.teacher_steps,
        "teacher": _data_uris(images.teacher),
        "samples": samples,
        "small": max(width, height) <= MAX_TILE // 4,
        "error_gain": ERROR_GAIN,
    }


def _data_uris(films: Sequence[Film]) -> list[str]:
    """WebP, of videos moving ones; without loss if they are so small that this costs nothing."""
    uris = []
    for film in films:
        frames, content = [frame.convert("RGB") for frame in film], io.BytesIO()
        for frame in frames:
            frame.thumbnail((MAX_TILE, MAX_TILE))
        moving = {"save_all": True, "append_images": frames[1:], "duration": FRAME_MS, "loop": 0}
        lossless = max(frames[0].size) < MAX_TILE
        frames[0].save(content, "WEBP", quality=90, lossless=lossless, **(moving if len(frames) > 1 else {}))
        uris.append(f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}")
    return uris


def _number(value: float) -> str:
    """Three digits, zeros at the end as well."""
    return f"{value:#.3g}".removesuffix(".")


def _signed(value: float) -> str:
    """Two decimals without a zero before them, so that ten columns fit on a phone."""
    value = round(value, 2)
    if value == 0:
        return "0"
    text = f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
    return text.replace("0.", ".") if abs(value) < 1 else text


def _sha256(text: str) -> str:
    """As a content security policy names a script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
