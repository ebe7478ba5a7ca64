"""Settings of a search: what Python callers and the command line share."""

import argparse
import itertools
import json
import os
import types
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

import torch
from accelerate.utils import LoggerType
from huggingface_hub import cached_assets_path

from .fit.budget import BASE_CALLS, CALLS_PER_CUBED_STEP
from .fit.demands import HEAVY_CALLS
from .gradient.recipe import PAPER_RECIPE
from .measure.feature_network import INCEPTION
from .measure.image_metrics import ImageSettings
from .pipeline.loading import NAMES, Source
from .pipeline.readying import OFFLOADS, QUANTIZERS
from .teacher.batches import BATCH_SIZE, TEACHER_STEPS


NUM_STEPS = (5, 8, 10)
TRACKERS = sorted(set(LoggerType.list()) - {"all"})
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Options of how a pipeline is loaded and made ready.
OF_LOADING = ("variant", "revision", "custom_pipeline", "quantization", "offload", "compile", "mixed_precision")
# What depends on the fitter unless it is given.
DEFAULT_TEACHER_STEPS = {"gauss-newton": TEACHER_STEPS, "gradient": PAPER_RECIPE.teacher_steps}


def option(default, text: str, shown: str | None = None):
    """
    A field that the command line has as an option.

    Args:
        default: Its value unless it is given; None if that follows from others.
        text (`str`): What it is, in a few words.
        shown (`str`, *optional*): The default in words.
    """
    return field(default=default, metadata={"help": text, "shown": shown})


@dataclass(frozen=True)
class Settings:
    """
    Search few-step solvers for a diffusers pipeline and measure them.

        accelerate launch search/run.py --pipeline examples/digits-sit --num-steps 5 8 10 --output-dir OUT

    OUT is then what `SearchedSolverScheduler.from_pretrained(OUT)` loads, with `report.html`, `report.json`,
    `images.png` and a model card beside it; --push-to-hub uploads them. Samples are dealt out to the processes of
    `accelerate launch`. A search that was killed goes on with --resume; meanwhile OUT has the best solvers so far.

    Raises:
        ValueError: If settings contradict each other.
    """

    pipeline: str = field(
        metadata={
            "help": f"a folder, a Hub repository, one of {', '.join(NAMES)}, or FILE.py:FUNCTION that returns one"
        }
    )
    output_dir: Path = field(metadata={"help": "where the solver, the report and the images go"})
    num_steps: tuple[int, ...] | None = option(
        None, "step counts", f"{' '.join(map(str, NUM_STEPS))}, or those of the solver to evaluate"
    )
    class_labels: tuple[str, ...] | None = option(None, "ids or names", "all that the pipeline knows")
    prompts: tuple[str, ...] | None = option(None, "prompts, used in turn")
    prompts_file: Path | None = option(None, "or a file with one a line")
    negative_prompt: str | None = option(None, "of every call")
    height: tuple[int, ...] | None = option(None, "of the samples in pixels; several go with as many widths")
    width: tuple[int, ...] | None = option(None, "of the samples in pixels")
    num_frames: tuple[int, ...] | None = option(None, "of videos; several are searched for at once")
    guidance_scale: tuple[float, ...] | None = option(
        None,
        "one, or several that the solver has to serve, each with as many noises and calls as one has",
        "the pipeline's own; 1 for --fitter gradient",
    )
    call_kwargs: dict = field(
        default_factory=dict,
        metadata={
            "help": "further arguments of the pipeline's call, as JSON; images and videos as paths or addresses",
            "shown": "{}",
        },
    )
    variant: str | None = option(None, "of the weights, such as fp16")
    revision: str | None = option(None, "of the Hub repository")
    lora: tuple[str, ...] | None = option(None, "REPOSITORY or REPOSITORY:SCALE, fused into the networks")
    custom_pipeline: str | None = option(None, "of diffusers' community, or a folder or repository with its code")
    measure: Literal["auto", "full", "none"] = option(
        "auto",
        "how the solvers are measured: on held-out noises until it is clear who is better, for half of the search's "
        "calls at most; all rivals on all noises, by a finer teacher; or not at all",
    )
    num_eval_samples: int = option(256, "held-out noises to measure on, at most")
    image_metrics: int = option(0, "images of each solver to measure", "none")
    feature_network: str = option(
        INCEPTION,
        "for their FID, KID and so on: inception, none, a Python file with a function `feature_network`, or a "
        "TorchScript file",
    )
    reference_images: Path | None = option(None, "a folder of what images should be like", "the teacher's")
    teacher_steps: int | None = option(
        None,
        "of the teacher, doubled until its own error is small beside the solvers'",
        f"{TEACHER_STEPS}; for --fitter gradient {PAPER_RECIPE.teacher_steps}",
    )
    max_calls: int | None = option(
        None,
        "network calls for each step count N, guidance and teacher included: they decide how many noises, starts and "
        "iterations there are",
        f"{BASE_CALLS:,} + {CALLS_PER_CUBED_STEP} N^3 for each guidance scale; {HEAVY_CALLS:g} times that where a few "
        "noises are much harder than others",
    )
    start_solver: str | None = option(None, "race this one too: a folder, a bundled solver or a Hub repository")
    fitter: Literal["gauss-newton", "gradient"] = option("gauss-newton", "gradient is the paper's recipe")
    num_samples: int | None = option(None, "noises of --fitter gradient", f"{PAPER_RECIPE.num_samples:,}")
    batch_size: int = option(BATCH_SIZE, "samples in one pipeline call")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = option(
        None,
        "dtype of the networks; no is float32",
        "that of accelerate launch, or else bf16 where the weights and an accelerator have it",
    )
    quantization: Literal[*QUANTIZERS] | None = option(None, "of the networks that predict, by diffusers' quantisers")
    offload: Literal[*OFFLOADS] | None = option(
        None, "keep networks, or their layers, off the device but while they run"
    )
    compile: bool = option(False, "compile the networks that predict")
    seed: int = option(0, "of all noises")
    resume: bool = option(False, "go on with the search that was begun in --output-dir, if there is one")
    overwrite: bool = option(False, "search again what --output-dir has solvers of, or put aside what else it has")
    evaluate_only: bool = option(False, "search nothing: measure the solver in --output-dir once more")
    solver: str | None = option(None, "or this one: a folder, a bundled solver or a Hub repository")
    dry_run: bool = option(False, "say what all of it would cost, and stop")
    report_to: tuple[Literal[*TRACKERS], ...] | None = option(
        None, "accelerate's trackers, such as tensorboard in --output-dir"
    )
    cache_dir: Path | None = option(None, "where the teacher's end points are kept", "in the Hugging Face cache")
    push_to_hub: str | None = option(
        None, "upload the solver, its model card and the report to ORG/NAME when finished"
    )
    base_model: str | None = option(
        None, "the Hub repository of the pipeline, as the model card names it", "--pipeline, if that is one"
    )
    license: str = option("apache-2.0", "of the solver, as the Hub names licences")

    def __post_init__(self):
        self._check()
        gradient, launched = self.fitter == "gradient", os.environ.get("ACCELERATE_MIXED_PRECISION")
        follows = {
            "num_steps": None if self.evaluate_only else NUM_STEPS,
            "num_samples": PAPER_RECIPE.num_samples if gradient else None,
            "teacher_steps": DEFAULT_TEACHER_STEPS[self.fitter],
            # Unless it is told, accelerate launch says "no".
            "mixed_precision": launched if launched != "no" else None,
            "cache_dir": cached_assets_path("diffusers_searched_solver", "search", "teacher"),
        }
        for name, value in follows.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.mixed_precision not in (None, *DTYPES):
            raise ValueError(
                f"accelerate launch was told `--mixed_precision {self.mixed_precision}`; a search runs networks in "
                f"{', '.join(DTYPES)}. Pass one of these as --mixed-precision."
            )

    def _check(self):
        prepared = [name for name in ("lora", *OF_LOADING) if getattr(self, name)] if ".py:" in self.pipeline else []
        if prepared:
            raise ValueError(
                f"--pipeline {self.pipeline} is ready as the function returns it: leave out "
                f"--{prepared[0].replace('_', '-')}, and do the same there."
            )
        if self.prompts is not None and self.prompts_file is not None:
            raise ValueError("--prompts and --prompts-file are given. Leave out one of them.")
        for prompt in self.prompts or ():
            if prompt.endswith(".txt") and Path(prompt).is_file():
                raise ValueError(f"--prompts '{prompt}' is a file. Pass it as --prompts-file.")
        if self.height and self.width and len(self.height) != len(self.width):
            raise ValueError(f"--height has {len(self.height)} values, --width {len(self.width)}: they go in pairs.")
        if not isinstance(self.call_kwargs, dict):
            raise ValueError(f"--call-kwargs is {json.dumps(self.call_kwargs)}, expected a JSON object.")
        if self.evaluate_only and (self.resume or self.dry_run):
            raise ValueError("--evaluate-only searches nothing: leave out --resume and --dry-run.")
        if self.evaluate_only and self.measure == "none":
            raise ValueError("--evaluate-only measures: leave out --measure none.")
        if self.push_to_hub is not None and self.measure == "none":
            raise ValueError("--push-to-hub uploads a model card with what was measured: leave out --measure none.")
        if self.solver is not None and (not self.evaluate_only or self.push_to_hub is not None):
            raise ValueError("--solver is for --evaluate-only, and its results have no model card to push to the Hub.")
        if self.fitter == "gauss-newton" and self.num_samples is not None:
            raise ValueError(
                "--num-samples is for --fitter gradient; here --max-calls decides how many noises there are."
            )
        if self.fitter == "gradient" and (self.max_calls is not None or self.start_solver is not None):
            raise ValueError(
                "--max-calls and --start-solver are for --fitter gauss-newton; here --num-samples decides."
            )
        if self.num_eval_samples < 2:
            raise ValueError(f"`--num-eval-samples` is {self.num_eval_samples}, expected at least 2.")

    @property
    def scale(self) -> float | list[float] | None:
        """The guidance scale as reports have it: None for the pipeline's own, a number, or several."""
        if self.guidance_scale is None or len(self.guidance_scale) > 1:
            return self.guidance_scale and list(self.guidance_scale)
        return self.guidance_scale[0]

    @property
    def source(self) -> Source:
        """The pipeline."""
        how = {"quantization": self.quantization, "offload": self.offload, "compiled": self.compile}
        return Source(self.pipeline, self.variant, self.revision, self.custom_pipeline, self.lora or (), **how)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the networks, where it is asked for."""
        return None if self.mixed_precision is None else DTYPES[self.mixed_precision]

    @property
    def all_prompts(self) -> tuple[str, ...] | None:
        """
        Those of the command line, or of the file.

        Raises:
            ValueError: If the file has none.
        """
        if self.prompts_file is None:
            return self.prompts
        try:
            lines = tuple(line.strip() for line in self.prompts_file.read_text().splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts-file cannot be read: {error}") from error
        if not lines:
            raise ValueError(f"--prompts-file '{self.prompts_file}' has no prompt. Write one a line.")
        return lines

    @property
    def of_every_call(self) -> dict:
        """Arguments of every call."""
        negative = {} if self.negative_prompt is None else {"negative_prompt": self.negative_prompt}
        return {**negative, **self.call_kwargs}

    @property
    def sizes(self) -> list[dict[str, int]]:
        """What the samples' sizes are, as keyword arguments of the call: each of them has noises of its own."""
        given = {name: getattr(self, name) for name in ("height", "width") if getattr(self, name)}
        sizes = [dict(zip(given, pair, strict=True)) for pair in zip(*given.values(), strict=True)] or [{}]
        frames = [{"num_frames": count} for count in self.num_frames or ()] or [{}]
        return [size | count for size, count in itertools.product(sizes, frames)]

    @property
    def of_images(self) -> ImageSettings:
        """How images are measured."""
        network, reference = self.feature_network, self.reference_images
        return ImageSettings(self.image_metrics, network, reference, self.seed, self.output_dir)


def parse_settings(arguments: Sequence[str] | None = None) -> Settings:
    """
    The settings of a command line.

    transformers' `HfArgumentParser` would do, but for JSON, for tuples, and for a readable --help: it names every
    option twice.
    """
    parser = _parser()
    given = vars(parser.parse_args(arguments))
    try:
        return Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})
    except ValueError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    description = "\n".join(
        line.removeprefix("    ") for line in Settings.__doc__.split("    Raises:")[0].splitlines()
    )
    parser = argparse.ArgumentParser(
        description=description.strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for each in fields(Settings):
        default = MISSING if each.default is MISSING and each.default_factory is MISSING else _default(each)
        text = each.metadata["help"].replace("%", "%%")
        shown = each.metadata.get("shown") or (default if default not in (MISSING, None, False) else None)
        parser.add_argument(
            f"--{each.name.replace('_', '-')}",
            help=f"{text} (default: {shown})" if shown is not None else text,
            required=default is MISSING,
            **({} if default is MISSING else {"default": default}),
            **_how(each.type),
        )
    return parser


def _default(each):
    return each.default if each.default is not MISSING else each.default_factory()


def _json(text: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no JSON ({error}), expected an object such as '{{\"height\": 512}}', in single quotes with "
            "double ones inside"
        ) from error


def _how(annotation) -> dict:
    """What argparse makes of a field's type."""
    if get_origin(annotation) in (types.UnionType, Union):
        (annotation,) = (each for each in get_args(annotation) if each is not types.NoneType)
    if annotation is bool:
        return {"action": "store_true"}
    if annotation is dict:
        return {"type": _json}
    if get_origin(annotation) is tuple:
        return {"nargs": "+", **_how(get_args(annotation)[0])}
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    return {"type": annotation}
