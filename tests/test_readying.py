"""Options that make a pipeline ready: offloaded, quantised, compiled, in the dtype of the weights."""

import importlib.util

import pytest
import torch
from diffusers import DiTPipeline
from fields import EXAMPLES

from diffusers_searched_solver import SearchedSolverScheduler
from search.pipeline.loading import Source, load_pipeline
from search.pipeline.readying import OFFLOADS, QUANTIZERS, default_dtype, device_of, stored_in_bfloat16
from search.run import main


DIT, CPU = str(EXAMPLES / "digits-dit"), torch.device("cpu")


def image(pipe) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe([3], num_inference_steps=3, generator=generator, output_type="np").images)


@pytest.fixture(scope="module")
def plain():
    return image(load_pipeline(DIT, None, CPU))


def test_an_offloaded_pipeline_makes_the_same_image(plain):
    torch.testing.assert_close(image(load_pipeline(Source(DIT, offload="model"), None, CPU)), plain)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offloaded_networks_have_hooks_and_where_they_run_is_known(offload):
    # Layers that are offloaded from a CPU to itself do not run in accelerate; on an accelerator they do.
    pipe = load_pipeline(Source(DIT, offload=offload), None, CPU)
    assert any(hasattr(module, "_hf_hook") for module in pipe.transformer.modules())
    assert device_of(pipe).type == "cpu"


def test_a_pipeline_that_says_no_order_of_its_networks_is_not_offloaded_by_network(monkeypatch):
    monkeypatch.setattr(DiTPipeline, "model_cpu_offload_seq", None)
    with pytest.raises(ValueError, match="`--offload model`: .*model_cpu_offload_seq"):
        load_pipeline(Source(DIT, offload="model"), None, CPU)


def test_the_networks_that_predict_are_compiled_and_no_others():
    # That fields drive compiled networks is tested beside them.
    pipe = load_pipeline(Source(DIT, compiled=True), None, CPU)
    assert pipe.transformer._compiled_call_impl is not None
    assert pipe.vae._compiled_call_impl is None


def test_a_quantised_pipeline_is_near_the_plain_one_and_its_other_networks_are_as_they_were(plain):
    pytest.importorskip("torchao")
    pipe = load_pipeline(Source(DIT, quantization="torchao_int8"), None, CPU)
    assert "Int8" in type(pipe.transformer.transformer_blocks[0].attn1.to_q.weight).__name__
    assert type(pipe.vae.decoder.conv_in.weight) is torch.nn.Parameter
    difference = (image(pipe) - plain).abs().mean()
    assert 0 < difference < 0.05


@pytest.mark.parametrize("name", QUANTIZERS)
def test_a_quantiser_that_is_not_installed_is_named(name):
    package, _ = QUANTIZERS[name]
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=f"`--quantization {name}` needs {package}, .* Run `pip install {package}`"):
        load_pipeline(Source(DIT, quantization=name), None, CPU)


def test_weights_in_bfloat16_are_known_without_loading_them_and_a_cpu_computes_in_float32(tmp_path):
    pipe = load_pipeline(DIT, torch.bfloat16, CPU)
    pipe.save_pretrained(tmp_path, variant="bf16")
    assert stored_in_bfloat16(tmp_path, "bf16")
    assert not stored_in_bfloat16(tmp_path, "fp16")
    assert not stored_in_bfloat16(DIT, None)
    assert load_pipeline(Source(str(tmp_path), variant="bf16"), None, CPU).transformer.dtype == torch.float32
    # As it would be on a Mac, whose tensors are not needed to say so.
    assert default_dtype(tmp_path, "bf16", torch.device("mps")) == torch.bfloat16
    assert default_dtype(DIT, None, torch.device("mps")) == torch.float32


PREPARED = f"""
import torch
from diffusers import DiTPipeline

def make():
    return DiTPipeline.from_pretrained("{DIT}", dtype=torch.bfloat16)
"""


def test_what_a_function_has_prepared_is_not_made_ready_again(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(PREPARED)
    name = f"{tmp_path}/mine.py:make"
    for option in (["--offload", "model"], ["--compile"], ["--lora", "x"], ["--mixed-precision", "no"]):
        with pytest.raises(SystemExit):
            main(["--pipeline", name, "--output-dir", str(tmp_path / "out"), *option])
        assert f"is ready as the function returns it: leave out {option[0]}" in capsys.readouterr().err
    with pytest.raises(ValueError, match="returned a pipeline in bfloat16 where float16 is asked for"):
        load_pipeline(name, torch.float16, CPU)
    assert load_pipeline(name, None, CPU).dtype == torch.bfloat16


def test_a_search_runs_on_an_offloaded_pipeline(tmp_path):
    arguments = ["--num-steps", "3", "--max-calls", "4000", "--measure", "none", "--offload", "model"]
    main(["--pipeline", DIT, "--output-dir", str(tmp_path), *arguments, "--guidance-scale", "1"])
    assert SearchedSolverScheduler.from_pretrained(tmp_path).solver_file.step_counts == [3]
