"""
The oldest and the newest supported versions: `pip install nox`, then `nox -f .ci/noxfile.py`, from any folder.

`oldest` holds Python, the dependencies and those of the search at the lower bounds of pyproject.toml, so none is
claimed untested; `newest` takes what the package index has. Arguments behind `--` go to pytest. With TORCH=2.13.0 in
the environment both take that version of torch, where an index has builds of others only for other machines.
"""

import os
from pathlib import Path

import nox


ROOT = Path(__file__).parent.parent
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")["project"]
OLDEST_PYTHON = PROJECT["requires-python"].removeprefix(">=")

nox.options.error_on_missing_interpreters = False


def run_tests(session: nox.Session, versions: list[str]):
    """Test with these versions of what is installed, given as "name==version"."""
    if torch := os.environ.get("TORCH"):
        versions = [each for each in versions if not each.startswith("torch==")] + [f"torch=={torch}"]
    constraints = Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("\n".join(versions))
    session.chdir(ROOT)
    session.install("-e", ".[test]", "--constraint", str(constraints))
    session.run("pip", "list")
    session.run("pytest", *session.posargs)


@nox.session(python=OLDEST_PYTHON)
def oldest(session: nox.Session):
    bounds = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["search"]
    run_tests(session, [bound.replace(">=", "==") for bound in bounds])


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
def newest(session: nox.Session):
    run_tests(session, [])
