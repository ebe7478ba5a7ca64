"""
What only a GPU can show: speed, memory and host waits at the size of real models, with random weights.

    python tests/gpu_check.py

prints one table, in under eight minutes on a card of 80 GB. Without a GPU it says so and runs, with small networks on
the CPU, whatever of it a CPU can run.

    calls      network calls a second in a run of the search's field, over those in the pipeline's own (at least 0.95)
    memory     peak of that run over the peak of the pipeline's own call
    waits      of the host for the device in `step` (none)
    graph      ten steps as one CUDA graph, and compiled with mode="reduce-overhead": largest difference to eager
    step       time of a step over that of DPM-Solver++(2M) and of UniPC
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)

from diffusers_searched_solver import SearchedSolver, SearchedSolverScheduler, tensor_step, time_grid
from diffusers_searched_solver.teacher import teacher_solver
from search.launch.network_calls import NetworkCalls
from search.pipeline.field import PipelineField
from search.pipeline.rollout import rollout
from search.results.record import Report


ROOT = Path(__file__).parent.parent
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
STEPS, REPEATS = 10, 5


def vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(32,), norm_num_groups=32, latent_channels=4)


def dit():
    """DiT-XL/2 at 256 px, through the stock pipeline, with guidance."""
    size = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28} if ON_GPU else {"num_layers": 1}
    shape = {"in_channels": 4, "out_channels": 8, "sample_size": 32 if ON_GPU else 8, "patch_size": 2}
    network = DiTTransformer2DModel(**size, **shape, norm_type="ada_norm_zero", num_embeds_ada_norm=1000)
    pipe = DiTPipeline(network, vae(), DDIMScheduler())
    return pipe, {"class_labels": [1], "guidance_scale": 4.0, "output_type": "np"}


def sdxl():
    """A network of Stable Diffusion XL's size at 1024 px, with guidance."""
    size = (
        {
            "block_out_channels": (320, 640, 1280),
            "transformer_layers_per_block": (1, 2, 10),
            "cross_attention_dim": 2048,
        }
        if ON_GPU
        else {"block_out_channels": (32, 64, 64), "transformer_layers_per_block": 1, "cross_attention_dim": 32}
    )
    width, latents = (2048, 128) if ON_GPU else (32, 8)
    network = UNet2DConditionModel(
        **size,
        sample_size=latents,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20) if ON_GPU else 8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256 if ON_GPU else 8,
        projection_class_embeddings_input_dim=2816 if ON_GPU else 8 * 6 + 32,
    )
    pipe = StableDiffusionXLPipeline(
        vae(),
        None,
        None,
        None,
        None,
        network,
        EulerDiscreteScheduler(timestep_spacing="leading"),
        add_watermarker=False,
    )
    pooled = 2816 - 6 * 256 if ON_GPU else 32
    names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
    shapes = (1, 77, width), (1, 77, width), (1, pooled), (1, pooled)
    embeds = {name: torch.zeros(shape, dtype=DTYPE, device=DEVICE) for name, shape in zip(names, shapes, strict=True)}
    scale = pipe.vae_scale_factor
    return pipe, {**embeds, "height": latents * scale, "width": latents * scale, "guidance_scale": 5.0}


def flux():
    """A network of Flux.1's size at 1024 px; guidance is distilled into it."""
    size = (
        {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128}
        if ON_GPU
        else {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    )
    axes, joint, pooled = ((16, 56, 56), 4096, 768) if ON_GPU else ((4, 4, 8), 32, 32)
    network = FluxTransformer2DModel(
        **size, in_channels=64 if ON_GPU else 16, axes_dims_rope=axes, guidance_embeds=True,
        joint_attention_dim=joint, pooled_projection_dim=pooled,
    )  # fmt: skip
    autoencoder = AutoencoderKL(block_out_channels=(32,), latent_channels=16 if ON_GPU else 4)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder, None, None, None, None, network)
    embeds = {
        "prompt_embeds": torch.zeros(1, 512 if ON_GPU else 8, joint, dtype=DTYPE, device=DEVICE),
        "pooled_prompt_embeds": torch.zeros(1, pooled, dtype=DTYPE, device=DEVICE),
    }
    size = (128 if ON_GPU else 8) * pipe.vae_scale_factor
    return pipe, {**embeds, "height": size, "width": size, "guidance_scale": 3.5}


MODELS = {"DiT-XL/2, 256 px": dit, "SDXL, 1024 px": sdxl, "Flux, 1024 px": flux}


def built(make: Callable):
    """A pipeline with random weights, made where they go."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with DEVICE:
            pipe, inputs = make()
    finally:
        torch.set_default_dtype(before)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(DEVICE, DTYPE), {**inputs, "output_type": "latent"} if "prompt_embeds" in inputs else inputs


def seconds(work: Callable[[], object]) -> float:
    """The median of some runs after a warm-up, all work of the device included."""
    found = []
    for _ in range(REPEATS + 1):
        synchronise()
        started = time.perf_counter()
        work()
        synchronise()
        found.append(time.perf_counter() - started)
    return sorted(found[1:])[REPEATS // 2]


def synchronise():
    if ON_GPU:
        torch.cuda.synchronize()


def peak(work: Callable[[], object]) -> float:
    """Peak memory in bytes; of a CPU nothing is known that could be set back."""
    if not ON_GPU:
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    work()
    synchronise()
    return torch.cuda.max_memory_allocated()


def of_model(make: Callable) -> tuple[float, float]:
    """Calls a second and peak memory of the search's field, over those of the pipeline's own call."""
    pipe, inputs = built(make)
    solver = teacher_solver(SearchedSolverScheduler.from_config(pipe.scheduler.config).process, STEPS)
    calls = NetworkCalls(pipe)
    field = PipelineField(pipe, inputs, [0], calls)
    searching, searching_peak = seconds(lambda: rollout(field, solver)), peak(lambda: rollout(field, solver))
    field.close()
    calls.remove()
    pipe.scheduler = SearchedSolverScheduler.from_config(pipe.scheduler.config, solver=solver)

    def sample():
        with torch.no_grad():
            pipe(**inputs, num_inference_steps=STEPS, generator=torch.Generator("cpu").manual_seed(0))

    return seconds(sample) / searching, searching_peak / peak(sample)


def flow_scheduler() -> SearchedSolverScheduler:
    solver = SearchedSolver.adams_bashforth(*time_grid(_process(), STEPS), "velocity", order=3)
    return SearchedSolverScheduler.from_config(_config(), solver=solver)


def _config():
    return FlowMatchEulerDiscreteScheduler().config


def _process():
    return SearchedSolverScheduler.from_config(_config()).process


def steps_of(scheduler, sample: torch.Tensor, outputs: torch.Tensor):
    """One run."""
    scheduler.set_timesteps(STEPS, device=DEVICE)
    for t, output in zip(scheduler.timesteps, outputs, strict=True):
        sample = scheduler.step(output, t, sample, return_dict=False)[0]
    return sample


def waits() -> int:
    """Of the host for the device, in the steps of one run."""
    scheduler, sample, outputs = flow_scheduler(), *_tensors()
    scheduler.set_timesteps(STEPS, device=DEVICE)
    timesteps = list(scheduler.timesteps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for t, output in zip(timesteps, outputs, strict=True):
            sample = scheduler.step(output, t, sample, return_dict=False)[0]
    except RuntimeError:
        return 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0


def _tensors():
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (1, 16, 128, 128) if ON_GPU else (1, 4, 16, 16)
    return torch.randn(shape, generator=generator).to(DEVICE), torch.randn(STEPS, *shape, generator=generator).to(
        DEVICE
    )


def whole_loop(sample: torch.Tensor, outputs: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Ten steps of `tensor_step`."""
    history = torch.zeros_like(outputs)
    for i in range(STEPS):
        sample, history = tensor_step(sample, outputs[i], history, torch.full((1,), i, device=sample.device), table)
    return sample


def graphs() -> Iterator[tuple[str, float]]:
    """The loop in one CUDA graph and compiled, beside eager and beside the scheduler."""
    sample, outputs = _tensors()
    solver = flow_scheduler().solver_file.solvers[STEPS]
    table = solver.update_table("flow_prediction").float().to(DEVICE)
    eager = whole_loop(sample, outputs, table)
    yield "scheduler and tensor_step", float((steps_of(flow_scheduler(), sample, outputs) - eager).abs().max())
    if not ON_GPU:
        return
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        whole_loop(sample, outputs, table)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = whole_loop(sample, outputs, table)
    graph.replay()
    yield "one CUDA graph", float((captured - eager).abs().max())
    compiled = torch.compile(whole_loop, mode="reduce-overhead")
    for _ in range(3):
        end = compiled(sample, outputs, table)
    yield 'compile(mode="reduce-overhead")', float((end - eager).abs().max())


def step_costs() -> Iterator[tuple[str, float]]:
    """Time of a run of our steps over that of diffusers'."""
    sample, outputs = _tensors()
    ours = seconds(lambda: steps_of(flow_scheduler(), sample, outputs))
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    for name, cls in (("DPM-Solver++(2M)", DPMSolverMultistepScheduler), ("UniPC", UniPCMultistepScheduler)):
        yield name, ours / seconds(lambda cls=cls: steps_of(cls(**flow), sample, outputs))


def searches(pipeline: str, *options: str) -> dict[int, float]:
    """Errors that `accelerate launch` of one process finds with the default search, by number of steps."""
    with tempfile.TemporaryDirectory() as out:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "search/run.py"]
        settings = ["--pipeline", f"examples/{pipeline}", "--guidance-scale", "2", "--output-dir", out, *options]
        subprocess.run([*launch, *settings], cwd=ROOT, check=True, capture_output=True)
        summaries = Report.read(Path(out)).summaries
    return {n: summary.searched.endpoint_error for n, summary in summaries.items()}


def main():
    """Print the table, row by row."""
    name = torch.cuda.get_device_name() if ON_GPU else "no GPU here: small networks on the CPU, and no graphs or waits"
    print(f"| {name} | measured |\n|---|---|", flush=True)

    def row(title: str, value: str):
        print(f"| {title} | {value} |", flush=True)

    for title, make in MODELS.items():
        calls, memory = of_model(make)
        row(f"{title}: calls, memory" if ON_GPU else f"{title}, small: calls", f"{calls:.2f}, {memory:.3f}")
        if ON_GPU:
            torch.cuda.empty_cache()
    if ON_GPU:
        row("host waits in step", str(waits()))
    for title, difference in graphs():
        row(f"{title}: largest difference", f"{difference:.1e}")
    for title, ratio in step_costs():
        row(f"step / {title}'s", f"{ratio:.2f}")
    for pipeline in ("digits-dit", "digits-sit"):
        errors = searches(pipeline, *([] if ON_GPU else ["--num-steps", "3", "--teacher-steps", "8"]))
        row(f"search, {pipeline}", ", ".join(f"{n} steps {error:.4f}" for n, error in errors.items()))


if __name__ == "__main__":
    main()
