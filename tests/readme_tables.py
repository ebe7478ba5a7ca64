"""
The tables of the READMEs, made from what searches and benchmarks have written to `examples/results`.

    python tests/readme_tables.py

writes them into the pages. `tests/test_readme.py` makes sure that they are what they would be.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from search.known.baselines import CLASSICAL
from search.measure.evaluate import SEARCHED
from search.measure.image_metrics import TEACHER
from search.results.record import Report


ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "examples" / "results"
PAGES = [ROOT / folder / "README.md" for folder in (".", "search", "examples", "examples/results")]
PIPELINES = "digits-dit", "digits-sit"
KINDS = {"digits-dit": "VP, epsilon", "digits-sit": "flow matching"}


def report_of(pipeline: str) -> Report:
    return Report.read(RESULTS / pipeline)


def rows_of(benchmark: str, **key) -> list[dict]:
    """The rows of a benchmark that have all of a key's values."""
    rows = json.loads((RESULTS / f"{benchmark}.json").read_text())["rows"]
    return [row for row in rows if all(row.get(name) == value for name, value in key.items())]


def results() -> Iterator[Sequence]:
    for name in PIPELINES:
        report = report_of(name)
        for num_steps, summary in report.summaries.items():
            searched, diffusers, classical = summary.searched, summary.diffusers, summary.classical
            cost = report.search.costs[num_steps]
            yield (
                f"{name} ({KINDS[name]})",
                num_steps,
                f"{searched.endpoint_error:.4f}",
                f"{diffusers.endpoint_error:.4f} ({diffusers.solver})",
                f"{classical.endpoint_error:.4f}",
                f"{diffusers.contest.ratio:.2f}, {classical.contest.ratio:.2f}",
                f"{cost.network_calls:,}",
                f"{cost.seconds:.0f}",
            )


def images() -> Iterator[Sequence]:
    for name in PIPELINES:
        for num_steps, rows in report_of(name).evaluation.image_metrics.results.items():
            metrics = {row.solver: row.metrics for row in rows if row.solver not in (TEACHER, CLASSICAL)}
            searched = metrics.pop(SEARCHED)
            nearest = min(metrics, key=lambda solver: metrics[solver]["fid"])
            cells = (f"{searched[key]:{form}} / {metrics[nearest][key]:{form}}" for key, form in METRICS.items())
            yield (f"{name}, {num_steps}", nearest, *cells)


METRICS = {"psnr": ".1f", "ssim": ".3f", "fid": ".5f"}


def seeds() -> Iterator[Sequence]:
    rivals = "best of diffusers", "best classical table", "UniPC, 2N steps", "the pipeline's own"
    for name, num_steps in itertools.product(PIPELINES, (5, 8, 10)):
        key = {"pipeline": name, "guidance": 2.0, "num_steps": num_steps}
        error = mean(row["curve"][-1]["error"] for row in rows_of("search_cost", **key, method="searched"))
        others = (rows_of("search_cost", **key, method=rival)[0]["error"] for rival in rivals)
        yield (f"{name}, {num_steps}", *(f"{error / other:.2f}" for other in others))


def other_searches() -> Iterator[Sequence]:
    methods = "times only (LD3)", "coefficients only (S4S)", "times by dynamic programming (GITS)"
    for name, num_steps in itertools.product(PIPELINES, (5, 8)):
        key = {"pipeline": name, "guidance": 2.0, "num_steps": num_steps}
        searched, *others = (
            mean(row["curve"][-1]["error"] for row in rows_of("search_cost", **key, method=method))
            for method in ("searched", *methods)
        )
        yield (f"{name}, {num_steps}", *(f"{other / searched:.1f}" for other in others))


def recipe() -> Iterator[Sequence]:
    for name, num_steps in itertools.product(PIPELINES, (5, 8)):
        key = {"pipeline": name, "guidance": 1.0, "num_steps": num_steps, "seed": 0}
        (ours,), (paper,) = (rows_of("search_cost", **key, method=method) for method in ("searched", "paper's recipe"))
        end = paper["curve"][-1]
        needed = min(point["calls"] for point in ours["curve"] if point["error"] <= end["error"])
        yield (f"{name}, {num_steps}", f"{end['calls']:,}", f"{needed:,}", f"{end['calls'] / needed:.0f}")


def carried(method: str, conditions: Mapping[str, str]) -> Iterator[Sequence]:
    for condition, title in conditions.items():
        cells = []
        for name, rival in itertools.product(PIPELINES, ("best of diffusers", "searched there")):
            key = {"pipeline": name, "condition": condition}
            error = mean(row["error"] for row in rows_of("generality", **key, method=method))
            cells.append(f"{error / rows_of('generality', **key, method=rival)[0]['error']:.2f}")
        yield (title, *cells)


ELSEWHERE = {
    **{f"guidance {scale}": f"guidance {scale}" for scale in ("1", "1.5", "3", "4")},
    "bfloat16": "bfloat16 weights",
    "fine-tune on digits upside down": "a fine-tune, on digits upside down",
    "classes 5 to 9, searched on 0 to 4": "classes 5 to 9, searched on 0 to 4",
}
OF_SEVERAL = {f"guidance {scale}": f"guidance {scale}, searched at 1, 2, 3 and 4 at once" for scale in ("1", "3", "4")}


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def tables() -> dict[str, list[str]]:
    """The lines of each table by its first."""
    carry = ("measured", "digits-dit / diffusers", "/ searched there", "digits-sit / diffusers", "/ searched there")
    found = {
        ("pipeline", "steps", "searched", "best of diffusers", "best classical table", "ratios", "network calls",
         "seconds"): results(),
        ("pipeline, steps", "best of diffusers by FID", "PSNR", "SSIM", "FID"): images(),
        ("pipeline, steps", "/ best of diffusers", "/ best classical table", "/ UniPC at twice the steps",
         "/ the pipeline's own scheduler"): seeds(),
        ("pipeline, steps", "times only (as LD3)", "coefficients only (as S4S)",
         "times by dynamic programming (as GITS)"): other_searches(),
        ("pipeline, steps", "the recipe's calls", "the search's", "times fewer"): recipe(),
        carry: itertools.chain(carried("carried", ELSEWHERE), carried("of several", OF_SEVERAL)),
    }  # fmt: skip
    lines = {}
    for header, rows in found.items():
        first = line(header)
        lines[first] = [first, "|---|" + "---:|" * (len(header) - 1), *map(line, rows)]
    return lines


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def with_tables(text: str) -> str:
    """A text in which each table whose first line is known has the lines that it should have."""
    known, lines, inside = tables(), [], False
    for each in text.splitlines():
        inside = inside and each.startswith("|")
        if each in known:
            lines += known[each]
            inside = True
        elif not inside:
            lines.append(each)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_tables(path.read_text()))
