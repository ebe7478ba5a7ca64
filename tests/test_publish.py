"""The model card of a search and its upload, to a Hub on the loopback interface that checks cards."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, metadata, metadata_errors, point_client_at
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from diffusers_searched_solver import SearchedSolverScheduler, list_hub_solvers
from diffusers_searched_solver.serialization import SOLVER_FILE
from search.measure.image_metrics import COLUMNS
from search.pipeline.loading import hub_repository
from search.results.card import check_place, write_card
from search.results.publish import FILES, PublishError, check_target, publish
from search.results.publish import main as publish_main
from search.run import main
from search.settings import Settings


ROOT = Path(__file__).parent.parent
REPO = "org/digits-solver"
SEARCH = f"""
    --pipeline {ROOT / "examples" / "digits-sit"} --num-steps 2 4 --num-eval-samples 8
    --teacher-steps 8 --guidance-scale 2 --image-metrics 8 --feature-network {ROOT / "examples" / "digits_features.py"}
""".split()
INJECTION = '"] | **x** </td><script>attack()</script>\n---\n````\n# [y](javascript:z) ![i](http://evil/i)'


@pytest.fixture(scope="module")
def hub():
    hub = Hub()
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def searched(hub, tmp_path_factory):
    """What a small search wrote and uploaded to `hub`."""
    out = tmp_path_factory.mktemp("publish") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        point_client_at(hub.endpoint, monkeypatch)
        main([*SEARCH, "--push-to-hub", REPO, "--output-dir", str(out)])
    return out


@pytest.fixture()
def folder(searched, tmp_path):
    """A copy, to be changed."""
    return Path(shutil.copytree(searched, tmp_path / "out"))


@pytest.fixture()
def online(hub, monkeypatch):
    point_client_at(hub.endpoint, monkeypatch)
    hub.requests.clear()
    return hub


def report_of(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def change_report(folder: Path, **changes):
    (folder / "report.json").write_text(json.dumps(report_of(folder) | changes))


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def files(hub, repo_id=REPO) -> dict[str, bytes]:
    return hub.find(repo_id, "main", TOKEN)[1]


# The card


def test_the_card_has_the_reports_numbers_exactly(folder):
    card, evaluation = ModelCard.load(folder / "README.md").data, report_of(folder)["evaluation"]
    found = {
        (result.dataset_config, result.metric_name): (result.metric_value, result.metric_args["interval_95"])
        for result in card.eval_results
    }
    expected = {}
    for num_steps, rows in evaluation["results"].items():
        for row in rows:
            name, value, interval = "End-point error", row["endpoint_error"], row["error_interval"]
            if row["solver"] != "searched":
                name = f"Error / {row['solver']}'s"
                value, interval = row["contest"]["ratio"], row["contest"]["ratio_interval"]
            expected[f"{num_steps} steps", name] = (value, interval)
    assert len(expected) >= 2 * 8
    assert found == expected
    for num_steps, rows in evaluation["image_metrics"]["results"].items():
        for row in rows:
            shown = "|".join(
                f" {row['metrics'][name]:#.3g} ".replace(". ", " ") if name in row["metrics"] else "  "
                for name in COLUMNS
            )
            assert f"| {num_steps} | {row['solver']} |{shown}|" in card_of(folder).splitlines()


def test_every_number_in_the_text_of_the_card_is_in_the_report(folder):
    text = ModelCard.load(folder / "README.md").text
    report = report_of(folder)
    numbers = set()

    def collect(value):
        if isinstance(value, dict):
            [collect(each) for each in value.values()]
        elif isinstance(value, list):
            [collect(each) for each in value]
        elif isinstance(value, (int, float)):
            # A kernel distance may be below zero, whose sign is no digit.
            numbers.update((str(value), f"{abs(value):#.3g}".removesuffix(".")))

    collect(report)
    cells = [cell for line in text.splitlines() if line.startswith("|") for cell in line.split("|")]
    figures = [number for cell in cells for number in re.findall(r"(?<![\w.])\d+\.\d+(?:e-\d+)?", cell)]
    rows = [row for rows in report["evaluation"]["results"].values() for row in rows]
    settings = {word for row in rows for word in row["setting"].split()}
    assert len(figures) > 40
    assert [number for number in figures if number not in numbers | settings] == []


def test_the_hub_understands_the_card(folder):
    card = ModelCard.load(folder / "README.md")
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert card.data.to_dict()["library_name"] == "diffusers"
    assert card.data.license == "apache-2.0"
    assert "searched-solver" in card.data.tags
    assert list(metadata_errors(metadata(card_of(folder)))) == []


def test_a_folder_is_no_base_model_and_a_hub_repository_is(folder):
    assert "base_model" not in metadata(card_of(folder))
    change_report(folder, base_model="facebook/DiT-XL-2-256")
    write_card(folder, REPO)
    assert metadata(card_of(folder))["base_model"] == "facebook/DiT-XL-2-256"
    assert list(metadata_errors(metadata(card_of(folder)))) == []


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        (str(ROOT / "examples" / "digits-sit"), None),
        ("examples/digits-sit", None),
        ("DiT-XL-2-256", "facebook/DiT-XL-2-256"),
        ("org/model", "org/model"),
    ],
    ids=["path", "path like a repository", "short name", "repository"],
)
def test_a_pipeline_is_a_hub_repository_unless_there_is_such_a_folder(name, repository, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert hub_repository(name) == repository


def test_the_card_has_the_exact_command(folder):
    assert f"```bash\n{report_of(folder)['search']['command']}\n```" in card_of(folder)
    assert "--num-steps 2 4" in report_of(folder)["search"]["command"]


def test_the_card_without_images_shows_none(folder):
    assert "](images.png)" in card_of(folder)
    (folder / "images.png").unlink()
    write_card(folder, REPO)
    assert "images.png" not in card_of(folder)
    assert ".images[0]" not in card_of(folder)


def test_strings_from_elsewhere_are_text_in_the_card(folder):
    """The page has the links, images, tags, blocks and tables of the page of a harmless report."""

    def structure():
        tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard.load(folder / "README.md").text)
        flat = [child for token in tokens for child in [token, *(token.children or [])]]
        kept = [token for token in flat if token.type not in ("text", "softbreak", "fence")]
        fences = [token.info for token in tokens if token.type == "fence"]
        return [(t.type, t.attrs, t.content if "html" in t.type else "") for t in kept if t.type != "inline"], fences

    harmless = structure()
    report = report_of(folder)
    for rows in report["evaluation"]["results"].values():
        for row in rows:
            row["setting"] = INJECTION
    report["evaluation"]["image_metrics"] |= {"feature_network": INJECTION, "reference": INJECTION}
    for rows in report["evaluation"]["image_metrics"]["results"].values():
        rows[0]["solver"] = INJECTION
    change_report(
        folder,
        evaluation=report["evaluation"],
        search=report["search"] | {"command": INJECTION},
        pipeline=INJECTION,
        example={"prompt": INJECTION},
        versions={INJECTION: INJECTION},
    )
    write_card(folder, "org/digits-solver")
    assert structure() == harmless
    assert "attack()" in card_of(folder)


def test_a_rival_that_diverges_is_left_out_of_the_metadata(folder):
    evaluation = report_of(folder)["evaluation"]
    rival = evaluation["results"]["2"][-1]
    rival["endpoint_error"] = None
    rival["contest"] |= {"ratio": None, "ratio_interval": [None, None]}
    change_report(folder, evaluation=evaluation)
    write_card(folder, REPO)
    metrics = ModelCard.load(folder / "README.md").data.eval_results
    assert all(math.isfinite(each.metric_value) for each in metrics)
    assert len(metrics) == sum(map(len, evaluation["results"].values())) - 1


def test_the_usage_in_the_card_runs_on_what_was_uploaded(searched, online, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    usage = re.search(r"```python\n(.*?)\n```", files(online)["README.md"].decode(), re.DOTALL)[1]
    assert f"from_pretrained('{REPO}')" in usage
    assert re.search(r"num_inference_steps=[24]\)", usage)
    found = {}
    exec(usage, found)
    assert found["pipe"].scheduler.solver_file.step_counts == [2, 4]
    assert found["image"].size[0] >= 8


# The upload


def test_a_search_uploads_everything_it_wrote_in_one_commit(searched, hub):
    repo = hub.repos[REPO]
    # The first commit is the empty repository's.
    assert len(repo.commits) == 2
    uploaded = files(hub)
    assert set(uploaded) == set(FILES)
    assert {path.relative_to(searched).as_posix() for path in searched.rglob("*") if path.is_file()} == set(FILES)
    assert all((searched / name).read_bytes() == content for name, content in uploaded.items())


def test_what_was_uploaded_loads_as_it_was_found(searched, online, tmp_path):
    loaded = SearchedSolverScheduler.from_pretrained(REPO, cache_dir=tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / SOLVER_FILE).read_bytes() == (searched / SOLVER_FILE).read_bytes()
    assert loaded.solver_file.provenance["license"] == "apache-2.0"


def test_what_was_uploaded_is_found_by_its_tag_and_base_model(folder, online):
    change_report(folder, base_model="org/model")
    publish(folder, "org/with-base")
    assert {REPO, "org/with-base"} <= {*list_hub_solvers()}
    assert list_hub_solvers("org/model") == ["org/with-base"]
    assert list_hub_solvers("org/other") == []


def test_uploading_again_updates_in_one_commit_and_leaves_other_files_alone(folder, online):
    publish(folder, "org/updated")
    online.commit("org/updated", {"notes.md": b"mine", ".gitattributes": b""})
    before = len(online.repos["org/updated"].commits)
    change_report(folder, seed=7)
    (folder / "images.png").unlink()
    (folder / "journal.jsonl").write_text("not to be uploaded")
    publish_main([str(folder), "org/updated"])
    assert len(online.repos["org/updated"].commits) == before + 1
    uploaded = files(online, "org/updated")
    assert json.loads(uploaded["report.json"])["seed"] == 7
    assert set(uploaded) == {*FILES, "notes.md", ".gitattributes"} - {"images.png"}


FAULTS = {
    "no right to create": ("POST /api/repos/create", 403, "403"),
    "no right to write": ("POST /api/models/org/refused/commit", 403, "403"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_an_upload_that_fails_loses_nothing_and_says_how_to_try_again(folder, online, case):
    match, status, message = FAULTS[case]
    before = {name: (folder / name).read_bytes() for name in FILES if name != "README.md"}
    with online.fault(match, status), pytest.raises(PublishError, match=f"not uploaded to .*{message}") as caught:
        publish(folder, "org/refused")
    command = str(caught.value).splitlines()[-1].split()
    assert command == ["python", "-m", "search.results.publish", str(folder), "org/refused"]
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    publish_main(command[3:])
    assert set(files(online, "org/refused")) == set(FILES)
    del online.repos["org/refused"]


def test_without_a_connection_the_upload_can_be_made_later(folder, monkeypatch):
    point_client_at("http://127.0.0.1:1", monkeypatch)
    with pytest.raises(PublishError, match="(?s)not uploaded.*Everything is in .*search.results.publish"):
        publish(folder, REPO)


def test_metadata_that_the_hub_refuses_is_reported_and_nothing_uploaded(folder, online):
    change_report(folder, license="do what you want")
    with pytest.raises(PublishError, match='"license" must be one of'):
        publish(folder, "org/refused")
    assert files(online, "org/refused") == {}


def test_a_folder_without_a_search_is_refused(tmp_path, online):
    with pytest.raises(SystemExit, match="error: The solver was not uploaded .*report.json"):
        publish_main([str(tmp_path), "org/new"])
    assert "org/new" not in online.repos


@pytest.mark.parametrize(
    ("repo_id", "message"),
    [("name", "expected 'org/name'"), ("a/b/c", "Repo id must be"), ("org/a b", "Repo id must"), ("", "Repo id must")],
)
def test_a_name_that_is_no_repositorys_is_refused_before_the_search(repo_id, message, online, tmp_path):
    with pytest.raises(ValueError, match=message):
        main([*SEARCH, "--push-to-hub", repo_id, "--output-dir", str(tmp_path)])
    assert not any(tmp_path.iterdir())


def test_a_readme_that_no_search_wrote_is_not_overwritten(folder, tmp_path):
    check_place(folder)
    check_place(tmp_path)
    (tmp_path / "README.md").write_text("# Mine\n")
    with pytest.raises(ValueError, match="README.md' is no search's and would be overwritten"):
        main([*SEARCH, "--output-dir", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_nobody_is_logged_in_is_said_before_the_search(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="Nobody is logged in .* Run `hf auth login`"):
        check_target(REPO)


def test_a_search_is_not_uploaded_unless_asked():
    assert Settings("x", Path("y")).push_to_hub is None


def test_a_search_whose_upload_is_refused_leaves_all_and_fails(hub, tmp_path):
    out = tmp_path / "out"
    smaller = ["--num-steps", "2", "--num-eval-samples", "2"]
    result = subprocess.run(
        [
            sys.executable,
            ROOT / "search/run.py",
            *SEARCH,
            *smaller,
            "--push-to-hub",
            "org/unauthorised",
            "--output-dir",
            out,
        ],
        env={**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_wrong", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode != 0
    assert "error: The solver was not uploaded to 'org/unauthorised': Client error '401" in result.stderr
    assert f"python -m search.results.publish {out} org/unauthorised" in result.stderr
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} == set(FILES)
    assert "org/unauthorised" not in hub.repos
