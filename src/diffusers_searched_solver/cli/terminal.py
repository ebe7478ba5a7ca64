"""Solver files as lines for the terminal. What they say of themselves is untrusted."""

from collections.abc import Iterator, Mapping

from ..serialization import SolverFile
from ..solver import SearchedSolver


MAX_LENGTH = 400


def printable(text: object) -> str:
    """`text` on one line, without the characters that would command a terminal or turn the line around."""
    line = " ".join(str(text).split())
    line = line if len(line) <= MAX_LENGTH else f"{line[:MAX_LENGTH]}..."
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in line)


def summary(file: SolverFile) -> dict[str, str]:
    """What a solver file is, and where it comes from."""
    first = file.solvers[file.step_counts[0]]
    return {
        "steps": ", ".join(map(str, file.step_counts)),
        "process": str(file.process),
        "prediction type": file.prediction_type,
        "frame": f"{first.frame}, rows of coefficients {'sum to one' if first.consistent else 'are free'}",
        **{printable(key): printable(value) for key, value in sorted(file.provenance.items())},
    }


def table(solvers: Mapping[str, SearchedSolver]) -> Iterator[str]:
    """
    Lines with the tables of solvers of one step count, step by step.

    Args:
        solvers: By a short name, which begins their lines.
    """
    width = max(map(len, solvers))
    num_steps = next(iter(solvers.values())).num_steps
    yield f"{'step':>4}  {'':{width}}  timestep    alpha    sigma  coefficients"
    for i in range(num_steps):
        for name, solver in solvers.items():
            nodes = f"{solver.timesteps[i]:8.2f} {solver.alphas[i]:8.5f} {solver.sigmas[i]:8.5f}"
            yield f"{i:4}  {name:{width}}  {nodes}  " + " ".join(f"{c:7.3f}" for c in solver.coefficients[i, : i + 1])
    for name, solver in solvers.items():
        yield f" end  {name:{width}}  {'':8} {solver.alphas[-1]:8.5f} {solver.sigmas[-1]:8.5f}"
