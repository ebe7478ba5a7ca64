"""What the command line and Python callers say of a search, and what a folder that has one already makes of it."""

import json
import shutil
import threading
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_pipelines import build

from diffusers_searched_solver import SearchedSolverScheduler
from search import measure
from search.pipeline.conditions import read_media, sampled_conditions, variant_of
from search.pipeline.loading import load_pipeline
from search.results.record import Report
from search.run import main
from search.settings import Settings, parse_settings


ROOT = Path(__file__).parent.parent
SIT = ROOT / "examples" / "digits-sit"
PIPELINE = ["--pipeline", str(SIT)]
SMALL = "--num-eval-samples 8 --teacher-steps 8 --guidance-scale 2".split()


def settings(**changes) -> Settings:
    return Settings("p", Path("out"), **changes)


def test_a_command_line_says_what_a_caller_in_python_says():
    said = '--num-steps 5 8 --guidance-scale 2 --call-kwargs {"strength":0.5} --resume --lora a/b:0.5'.split()
    parsed = parse_settings(["--pipeline", "p", "--output-dir", "out", *said])
    assert parsed == settings(
        num_steps=(5, 8), guidance_scale=(2.0,), call_kwargs={"strength": 0.5}, resume=True, lora=("a/b:0.5",)
    )
    assert (parsed.scale, settings().scale, settings(guidance_scale=(1.0, 2.0)).scale) == (2.0, None, [1.0, 2.0])


def test_help_has_a_line_and_a_default_for_every_option(capsys):
    with pytest.raises(SystemExit):
        parse_settings(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(Settings):
        assert f"--{field.name.replace('_', '-')} " in text
        if field.default not in (None, False) and isinstance(field.default, (int, str)):
            assert f"(default: {field.metadata['shown'] or field.default})" in text, field.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--call-kwargs", "{'height':16}"], "is no JSON"),
        (["--prompts", "a", "--prompts-file", "b"], "Leave out one of them"),
        (["--prompts", "PROMPTS.txt"], "is a file. Pass it as --prompts-file"),
        (["--height", "8", "16", "--width", "8"], "--height has 2 values, --width 1: they go in pairs"),
        (["--mixed-precision", "fp8"], "invalid choice: 'fp8'"),
        (["--push-to-hub", "a/b", "--measure", "none"], "leave out --measure none"),
        (["--num-eval-samples", "1"], "is 1, expected at least 2"),
    ],
    ids=["single quotes", "prompts twice", "a file of prompts", "sizes", "dtype", "a card of nothing", "one noise"],
)
def test_a_wrong_command_line_is_one_sentence(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PROMPTS.txt").write_text("a cat\n")
    with pytest.raises(SystemExit, match="2"):
        parse_settings(["--pipeline", "p", "--output-dir", "out", *options])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_accelerate_launch_was_told_of_precision_is_done_or_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert settings().mixed_precision == "bf16"
    assert settings(mixed_precision="no").mixed_precision == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(ValueError, match="was told `--mixed_precision fp8`; a search runs networks in no, fp16, bf16"):
        settings()


def test_a_file_of_prompts_has_one_a_line(tmp_path):
    (tmp_path / "prompts").write_text("a cat\n\n two dogs \n")
    assert settings(prompts_file=tmp_path / "prompts").all_prompts == ("a cat", "two dogs")
    (tmp_path / "prompts").write_text("\n")
    with pytest.raises(ValueError, match="has no prompt. Write one a line"):
        _ = settings(prompts_file=tmp_path / "prompts").all_prompts


# Conditions


def test_every_size_goes_with_every_prompt_and_each_is_a_variant_of_its_own():
    pipe = build("sd15").pipe
    sizes = settings(height=(16, 32), width=(16, 24)).sizes
    found = sampled_conditions(pipe, None, ["a", "b"], None, sizes, {"negative_prompt": "c"})
    of_call = [(each["prompt"], each["height"], each["width"], each["negative_prompt"]) for each in found]
    assert of_call == [("a", 16, 16, "c"), ("a", 32, 24, "c"), ("b", 16, 16, "c"), ("b", 32, 24, "c")]
    assert len({variant_of(condition) for condition in found}) == 2


def test_a_pipeline_that_wants_a_prompt_says_so_at_once():
    with pytest.raises(ValueError, match="StableDiffusionPipeline takes a `prompt`. Pass some with --prompts"):
        sampled_conditions(build("sd15").pipe, None, None, None, [{}], {})


def test_images_are_read_from_files(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("not an image")
    pipe = build("sd15_img2img").pipe
    arguments = pipe, None, ["a.png"], None, [{}]
    (found,) = sampled_conditions(*arguments, {"image": str(tmp_path / "a.png")})
    assert found["image"].size == (8, 6) and found["prompt"] == "a.png"
    with pytest.raises(ValueError, match="`image`: '.*b.png' cannot be read as an image or a video"):
        sampled_conditions(*arguments, {"image": str(tmp_path / "b.png")})
    with pytest.raises(ValueError, match="`image`: there is no file 'c.png'. Paths are relative to /"):
        sampled_conditions(*arguments, {"image": "c.png"})


def test_several_images_and_addresses_are_read(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    with serve_folder(tmp_path) as address:
        paths = [str(tmp_path / "a.png"), f"{address}/a.png?size=full"]
        (found,) = sampled_conditions(build("flux2").pipe, None, ["a cat"], None, [{}], {"image": paths})
        with pytest.raises(ValueError, match="`image`: '.*none.png' cannot be read as an image or a video"):
            read_media("image", f"{address}/none.png")
    assert [image.size for image in found["image"]] == [(8, 6), (8, 6)]


@contextmanager
def serve_folder(folder):
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("content", "function", "message"),
    [
        ("def make(): return 3", "make", "returned int, expected a diffusers pipeline"),
        ("", "make", "has no function `make`"),
        (None, "make", "There is no file"),
    ],
    ids=["no pipeline", "no function", "no file"],
)
def test_a_function_that_makes_no_pipeline_is_named(tmp_path, content, function, message):
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_pipeline(f"{tmp_path}/mine.py:{function}", torch.float32, torch.device("cpu"))


def test_a_single_file_is_refused_with_what_to_write():
    with pytest.raises(ValueError, match="a single file.*from_single_file.*--pipeline mine.py:make_pipeline"):
        load_pipeline("model.safetensors", torch.float32, torch.device("cpu"))


def test_a_lora_for_a_pipeline_that_takes_none_is_refused():
    with pytest.raises(ValueError, match="ClassToImagePipeline takes no LoRA"):
        load_pipeline(settings(lora=("a/b",)).source.__class__(str(SIT), loras=("a/b",)), torch.float32, "cpu")


# What a folder already has


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """What a small search of 3 steps wrote, for a pipeline that a function made."""
    folder = tmp_path_factory.mktemp("settings")
    (folder / "mine.py").write_text(
        "from diffusers_searched_solver.pipelines import ClassToImagePipeline\n"
        f"def make(): return ClassToImagePipeline.from_pretrained({str(SIT)!r})\n"
    )
    main(["--pipeline", f"{folder}/mine.py:make", *SMALL, "--num-steps", "3", "--output-dir", str(folder / "out")])
    return folder


@pytest.fixture()
def again(searched, tmp_path):
    """Arguments of another search in a copy of the folder, and the copy."""
    out = Path(shutil.copytree(searched / "out", tmp_path / "out"))
    return ["--pipeline", f"{searched}/mine.py:make", *SMALL, "--output-dir", str(out)], out


def test_further_step_counts_are_added_and_nothing_else_changes(again):
    arguments, out = again
    before = Report.read(out)
    solver = SearchedSolverScheduler.from_pretrained(out).solver_file.solvers[3]
    main([*arguments, "--num-steps", "3", "4"])
    after = Report.read(out)
    assert list(after.evaluation.results) == list(after.search.costs) == [3, 4]
    assert after.evaluation.results[3] == before.evaluation.results[3]
    file = SearchedSolverScheduler.from_pretrained(out).solver_file
    assert file.step_counts == [3, 4]
    assert file.solvers[3] == solver or (file.solvers[3].coefficients == solver.coefficients).all()
    assert "3 and 4" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-steps", "3"], "has solvers of 3 steps already. Search them again with --overwrite"),
        (["--num-steps", "4", "--seed", "1"], "had other settings: seed was 0, is 1.* with --overwrite"),
        (["--num-steps", "3", "--resume", "--seed", "1"], "had other settings: seed was 0, is 1"),
        (["--num-steps", "4", "--guidance-scale", "3"], "guidance_scale was 2.0, is 3.0"),
    ],
    ids=["the same", "another seed", "another seed, gone on with", "another guidance"],
)
def test_what_would_be_overwritten_is_refused_and_stays(again, options, message):
    arguments, out = again
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        main([*arguments, *options])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_finished_search_has_nothing_to_go_on_with(again, capsys):
    arguments, out = again
    before = (out / "report.json").stat().st_mtime_ns
    main([*arguments, "--num-steps", "3", "--resume"])
    assert "is finished: there is nothing to go on with" in capsys.readouterr().out
    assert (out / "report.json").stat().st_mtime_ns == before


def test_a_search_that_was_stopped_before_it_drew_draws(again, capsys):
    arguments, out = again
    report = Report.read(out)
    (out / "report.json").write_text(replace(report, pictures=False).to_json())
    (out / "images.png").unlink()
    main([*arguments, "--num-steps", "3", "--resume"])
    assert (out / "images.png").exists()
    drawn = Report.read(out)
    assert drawn.seconds_per_image.keys() == {3}
    assert replace(drawn, seconds_per_image={}) == replace(report, seconds_per_image={})


def test_a_report_of_another_version_is_refused_by_name(again):
    arguments, out = again
    content = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps({**content, "odd": 1}))
    with pytest.raises(ValueError, match="report.json' is no report of a search, or of another version.*odd"):
        main([*arguments, "--num-steps", "4"])


def test_numbers_that_are_not_finite_are_null_in_json(again):
    report = Report.read(again[1])
    row = replace(report.evaluation.results[3][-1], endpoint_error=float("inf"))
    evaluation = replace(report.evaluation, results={3: [*report.evaluation.results[3][:-1], row]})
    text = replace(report, evaluation=evaluation).to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert Report.from_json(text).evaluation.results[3][-1].endpoint_error == float("inf")


def test_measuring_from_python_writes_the_report_of_any_solver(tmp_path):
    pipe = load_pipeline(str(SIT), torch.float32, torch.device("cpu"))
    file = SearchedSolverScheduler.from_pretrained(ROOT / "examples" / "results" / "digits-sit").solver_file
    conditions = [{"class_labels": [k], "guidance_scale": 2.0} for k in range(4)]
    report = measure(pipe, file.solvers[5], conditions, tmp_path / "out", num_eval_samples=16)
    assert report.verdicts[5].use and "5 steps: as close to the teacher as" in report.verdicts[5].sentence
    assert (tmp_path / "out" / "report.html").exists() and (tmp_path / "out" / "images.png").exists()
    assert Report.read(tmp_path / "out") == report
    assert not pipe.transformer._forward_pre_hooks


def test_nothing_is_measured_if_so_asked(tmp_path):
    out = tmp_path / "out"
    main([*PIPELINE, *SMALL, "--num-steps", "3", "--measure", "none", "--output-dir", str(out)])
    assert {path.name for path in out.iterdir()} == {"report.json", "scheduler_config.json", "solver"}
    assert Report.read(out).evaluation is None
