"""Real diffusers pipelines around tiny random networks: offline, without text encoders, a second each or less."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import diffusers
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler


NUM_STEPS = 4
TOKENS = 5  # length of every prompt


@dataclass
class TinyPipeline:
    """
    A pipeline and how to call it.

    Args:
        pipe: The pipeline, with the scheduler that such models ship with.
        inputs (`dict`): What to call it with, except the step count and the generator.
        calls_per_step (`int`): Network calls a step; two where guidance runs the network twice.
        first_step, last_step (`int`): The steps that run, where the call is for a part of the schedule.
        network (`str`): The component that predicts.
        blends (`bool`): Whether the pipeline edits the state between the steps.
        sign (`int`): -1 where the pipeline hands the scheduler a negated velocity.
        output (`str`): Where the result is.
        scheduler, config: What came with it.
    """

    pipe: object
    inputs: dict = field(default_factory=dict)
    calls_per_step: int = 1
    first_step: int = 0
    last_step: int = NUM_STEPS - 1
    network: str = "transformer"
    blends: bool = False
    sign: int = 1
    output: str = "images"
    scheduler: object = field(init=False)
    config: dict = field(init=False)

    def attach(self, scheduler):
        """Put a scheduler in the pipeline, as a user would."""
        if hasattr(self.pipe, "blocks"):
            self.pipe.update_components(scheduler=scheduler)
        else:
            self.pipe.scheduler = scheduler

    @property
    def networks(self) -> list[torch.nn.Module]:
        found = (getattr(self.pipe, name, None) for name in (self.network, f"{self.network}_2"))
        return [network for network in found if network is not None]

    def __call__(self, seed: int = 0, num_inference_steps: int = NUM_STEPS):
        """The result of one call as a tensor; the generator begins at `seed`."""
        generator = torch.Generator().manual_seed(seed)
        result = self.pipe(**self.inputs, num_inference_steps=num_inference_steps, generator=generator)
        result = result if torch.is_tensor(result) else result[self.output]
        return torch.as_tensor(result[0] if isinstance(result, list) else result)


BUILDERS: dict[str, Callable[[], TinyPipeline]] = {}
OWN_SCHEDULE: dict[str, Callable[[], TinyPipeline]] = {}  # pipelines that always pass an explicit schedule


def tiny(function):
    """Register a builder under its name."""
    BUILDERS[function.__name__] = function
    return function


def tiny_with_own_schedule(function):
    OWN_SCHEDULE[function.__name__] = function
    return function


def build(name: str) -> TinyPipeline:
    """The tiny pipeline of this name, always with the same weights and the scheduler that it came with."""
    case = _built(name)
    case.attach(case.scheduler)
    return case


def build_anew(name: str) -> TinyPipeline:
    """One that nobody else has."""
    torch.manual_seed(0)
    case = {**BUILDERS, **OWN_SCHEDULE}[name]()
    case.scheduler, case.config = case.pipe.scheduler, case.pipe.scheduler.config
    for component in case.pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return case


_built = cache(build_anew)


def embeddings(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompts(width: int, pooled: int | None = None) -> dict:
    """A prompt and a negative prompt, already embedded."""
    inputs = {
        "prompt_embeds": embeddings(1, TOKENS, width),
        "negative_prompt_embeds": embeddings(1, TOKENS, width, seed=1),
    }
    if pooled:
        inputs["pooled_prompt_embeds"] = embeddings(1, pooled, seed=2)
        inputs["negative_pooled_prompt_embeds"] = embeddings(1, pooled, seed=3)
    return inputs


def masks(dtype=torch.long) -> dict:
    mask = torch.ones(1, TOKENS, dtype=dtype)
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}


def picture(size: int = 16) -> torch.Tensor:
    """An image in [0, 1]."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(4))


def half_mask(size: int = 16) -> torch.Tensor:
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 2 :] = 1
    return mask


def components(*names: str, **present) -> dict:
    """Constructor arguments: the components given, and None for those named."""
    return {**dict.fromkeys(names), **present}


def vae(latent_channels: int = 4, **kwargs) -> AutoencoderKL:
    """Halves an image's sides."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=16,
        **kwargs,
    )


def wan_vae(cls=diffusers.AutoencoderKLWan):
    """Halves a video's sides twice and its frames once."""
    factors = {"scale_factor_temporal": 2, "scale_factor_spatial": 4} if cls is diffusers.AutoencoderKLWan else {}
    return cls(
        **factors,
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def unet(cross_attention_dim: int = 8, **kwargs) -> diffusers.UNet2DConditionModel:
    kwargs = {"sample_size": 8, "in_channels": 4, "out_channels": 4, **kwargs}
    return diffusers.UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        cross_attention_dim=cross_attention_dim,
        **kwargs,
    )


def stable_diffusion_scheduler(**kwargs) -> DDIMScheduler:
    """As the models' repositories configure it."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**betas, clip_sample=False, steps_offset=1, **kwargs)


def flow_scheduler(**kwargs) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**kwargs)


def unipc_flow_scheduler(shift: float) -> diffusers.UniPCMultistepScheduler:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)


# Variance-preserving models


@tiny
def dit():
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        norm_num_groups=2,
        sample_size=8,
    )
    pipe = diffusers.DiTPipeline(transformer, vae(), DDIMScheduler())
    return TinyPipeline(pipe, {"class_labels": [3, 7], "output_type": "np"})


def pixel_unet():
    return diffusers.UNet2DModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
    )


@tiny
def ddim():
    return TinyPipeline(
        diffusers.DDIMPipeline(pixel_unet(), DDIMScheduler()), {"batch_size": 2, "output_type": "np"}, network="unet"
    )


@tiny
def ddpm():
    return TinyPipeline(
        diffusers.DDPMPipeline(pixel_unet(), DDPMScheduler()), {"batch_size": 2, "output_type": "np"}, network="unet"
    )


def sd15_components(**kwargs) -> dict:
    return components(
        "text_encoder",
        "tokenizer",
        "safety_checker",
        "feature_extractor",
        vae=vae(),
        unet=unet(),
        scheduler=stable_diffusion_scheduler(),
        requires_safety_checker=False,
        **kwargs,
    )


@tiny
def sd15():
    pipe = diffusers.StableDiffusionPipeline(**sd15_components())
    return TinyPipeline(pipe, {**prompts(8), "height": 16, "width": 16, "output_type": "pt"}, network="unet")


@tiny
def sd15_v_prediction():
    case = sd15()
    case.pipe.scheduler = stable_diffusion_scheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return case


@tiny
def sd15_img2img():
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**sd15_components())
    inputs = {**prompts(8), "image": picture(), "strength": 0.75, "output_type": "pt"}
    return TinyPipeline(pipe, inputs, first_step=1, network="unet")


@tiny
def sd15_inpaint():
    pipe = diffusers.StableDiffusionInpaintPipeline(**sd15_components())
    inputs = {**prompts(8), "image": picture(), "mask_image": half_mask(), "height": 16, "width": 16}
    inputs |= {"strength": 0.75, "output_type": "pt"}
    return TinyPipeline(pipe, inputs, first_step=1, network="unet", blends=True)


@tiny
def animatediff():
    adapter = diffusers.MotionAdapter(
        block_out_channels=(4, 8), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    parts = sd15_components()
    parts = {key: value for key, value in parts.items() if "safety" not in key}
    pipe = diffusers.AnimateDiffPipeline(**parts, motion_adapter=adapter)
    inputs = {**prompts(8), "num_frames": 2, "height": 16, "width": 16, "output_type": "pt"}
    return TinyPipeline(pipe, inputs, network="unet", output="frames")


@tiny
def sd15_controlnet():
    controlnet = diffusers.ControlNetModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        cross_attention_dim=8,
        conditioning_embedding_out_channels=(2, 4),
    )
    pipe = diffusers.StableDiffusionControlNetPipeline(**sd15_components(controlnet=controlnet))
    return TinyPipeline(pipe, {**prompts(8), "image": picture(), "output_type": "pt"}, network="unet")


def sdxl_case(pipeline, first_step=0, last_step=NUM_STEPS - 1, blends=False, **inputs):
    network = unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        # six numbers on sizes and crops, and the pooled prompt
        projection_class_embeddings_input_dim=6 * 4 + 8,
        transformer_layers_per_block=1,
        use_linear_projection=True,
    )
    pipe = pipeline(
        **components("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
        vae=vae(),
        unet=network,
        scheduler=stable_diffusion_scheduler(timestep_spacing="leading"),
        add_watermarker=False,
    )
    inputs = {**prompts(8, pooled=8), "output_type": "pt", **inputs}
    return TinyPipeline(pipe, inputs, first_step=first_step, last_step=last_step, network="unet", blends=blends)


@tiny
def sdxl():
    return sdxl_case(diffusers.StableDiffusionXLPipeline, height=16, width=16)


@tiny
def sdxl_denoising_end():
    return sdxl_case(
        diffusers.StableDiffusionXLPipeline,
        last_step=1,
        height=16,
        width=16,
        denoising_end=0.3,
        output_type="latent",
    )


@tiny
def sdxl_denoising_start():
    return sdxl_case(
        diffusers.StableDiffusionXLImg2ImgPipeline, first_step=2, image=embeddings(1, 4, 8, 8), denoising_start=0.3
    )


@tiny
def sdxl_img2img():
    return sdxl_case(diffusers.StableDiffusionXLImg2ImgPipeline, first_step=2, image=picture(), strength=0.5)


@tiny
def sdxl_inpaint():
    return sdxl_case(
        diffusers.StableDiffusionXLInpaintPipeline,
        first_step=1,
        blends=True,
        image=picture(),
        mask_image=half_mask(),
        height=16,
        width=16,
        strength=0.75,
    )


def pixart_case(pipeline, **transformer):
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        out_channels=8,
        num_layers=1,
        norm_num_groups=2,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
        **transformer,
    )
    pipe = pipeline(
        **components("tokenizer", "text_encoder", vae=vae(), transformer=network, scheduler=DDIMScheduler())
    )
    inputs = {**prompts(8), **masks(), "negative_prompt": None, "use_resolution_binning": False, "output_type": "pt"}
    return TinyPipeline(pipe, {**inputs, "height": 16, "width": 16})


@tiny
def pixart_alpha():
    return pixart_case(diffusers.PixArtAlphaPipeline, use_additional_conditions=False)


@tiny
def pixart_sigma():
    return pixart_case(diffusers.PixArtSigmaPipeline)


@tiny
def hunyuan_dit():
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        hidden_size=16,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=8,
        text_len=TOKENS,
        text_len_t5=TOKENS,
        mlp_ratio=1.0,
        activation_fn="gelu-approximate",
    )
    pipe = diffusers.HunyuanDiTPipeline(
        **components("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        **components("safety_checker", "feature_extractor", requires_safety_checker=False),
        vae=vae(),
        transformer=transformer,
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.018),
    )
    both = {**prompts(8), **masks()}
    both |= {f"{name}_2": value for name, value in both.items()}
    inputs = {**both, "height": 16, "width": 16, "use_resolution_binning": False, "output_type": "pt"}
    return TinyPipeline(pipe, inputs)


@tiny
def cogvideox():
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=8,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=TOKENS,
    )
    video_vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        sample_height=16,
        sample_width=16,
    )
    pipe = diffusers.CogVideoXPipeline(
        None,
        None,
        video_vae,
        transformer,
        diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=1.0
        ),
    )
    inputs = {**prompts(8), "height": 16, "width": 16, "num_frames": 9, "max_sequence_length": TOKENS}
    return TinyPipeline(pipe, {**inputs, "output_type": "latent"}, output="frames")


@tiny
def kandinsky22_decoder():
    network = unet(
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
    )
    movq = diffusers.VQModel(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 3 + ("AttnUpDecoderBlock2D",),
        latent_channels=4,
        norm_num_groups=2,
        num_vq_embeddings=6,
        vq_embed_dim=4,
    )
    pipe = diffusers.KandinskyV22Pipeline(network, DDPMScheduler(variance_type="learned_range"), movq)
    inputs = {"image_embeds": embeddings(1, 8), "negative_image_embeds": embeddings(1, 8, seed=1)}
    return TinyPipeline(pipe, {**inputs, "height": 64, "width": 64, "output_type": "pt"}, network="unet")


@tiny
def deepfloyd_if():
    parts = components("tokenizer", "text_encoder", "safety_checker", "feature_extractor", "watermarker")
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    network = unet(in_channels=3, out_channels=6)
    pipe = diffusers.IFPipeline(**parts, unet=network, scheduler=scheduler, requires_safety_checker=False)
    return TinyPipeline(pipe, {**prompts(8), "height": 8, "width": 8, "output_type": "pt"}, network="unet")


@tiny
def latte():
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=4,
        num_attention_heads=2,
        caption_channels=8,
        in_channels=4,
        cross_attention_dim=8,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=2,
    )
    pipe = diffusers.LattePipeline(
        **components("tokenizer", "text_encoder", vae=vae(), transformer=transformer, scheduler=DDIMScheduler())
    )
    inputs = {**prompts(8), "negative_prompt": None, "height": 16, "width": 16, "video_length": 2}
    return TinyPipeline(pipe, {**inputs, "clean_caption": False, "output_type": "pt"}, output="frames")


@tiny
def audioldm2():
    from transformers import GPT2Config, GPT2Model, SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel

    network = diffusers.AudioLDM2UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        cross_attention_dim=(8, 8),
    )
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8,
            sampling_rate=16000,
            upsample_initial_channel=4,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3, 5]],
        )
    )
    pipe = diffusers.AudioLDM2Pipeline(
        **components("text_encoder", "projection_model", "tokenizer", "tokenizer_2", "feature_extractor"),
        # Neither is called, but the pipeline reads the kind of the one and the dtype of the other.
        text_encoder_2=T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        language_model=GPT2Model(
            GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        ),
        vae=AutoencoderKL(
            in_channels=1,
            out_channels=1,
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
        ),
        unet=network,
        vocoder=vocoder,
        scheduler=stable_diffusion_scheduler(),
    )
    inputs = {
        **prompts(8),
        "generated_prompt_embeds": embeddings(1, TOKENS, 8, seed=2),
        "negative_generated_prompt_embeds": embeddings(1, TOKENS, 8, seed=3),
        "attention_mask": torch.ones(1, TOKENS, dtype=torch.long),
        "negative_attention_mask": torch.ones(1, TOKENS, dtype=torch.long),
        "audio_length_in_s": 0.004,
        "output_type": "pt",
    }
    return TinyPipeline(pipe, inputs, network="unet", output="audios")


# Flow-matching image models


@tiny
def sana():
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=4,
    )
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    pipe = diffusers.SanaPipeline(None, None, autoencoder, transformer, flow_scheduler(shift=3.0))
    inputs = {**prompts(8), **masks(), "negative_prompt": None, "height": 32, "width": 32}
    return TinyPipeline(pipe, {**inputs, "use_resolution_binning": False, "output_type": "pt"})


@tiny
def lumina2():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 16, 16),
        cap_feat_dim=8,
    )
    pipe = diffusers.Lumina2Pipeline(transformer, flow_scheduler(shift=6.0), vae(shift_factor=0.1), None, None)
    return TinyPipeline(
        pipe,
        {**prompts(8), **masks(torch.bool), "height": 32, "width": 32, "output_type": "pt"},
        calls_per_step=2,
    )


@tiny
def aura_flow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    pipe = diffusers.AuraFlowPipeline(None, None, vae(), transformer, flow_scheduler(shift=1.73))
    return TinyPipeline(pipe, {**prompts(8), **masks(), "height": 16, "width": 16, "output_type": "pt"})


def flux_case(pipeline, in_channels=16, first_step=0, calls_per_step=1, blends=False, **inputs):
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = pipeline(
        **components("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        scheduler=flow_scheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae(shift_factor=0.0, scaling_factor=1.0, use_quant_conv=False, use_post_quant_conv=False),
        transformer=transformer,
    )
    prompt = {key: value for key, value in prompts(8, pooled=8).items() if not key.startswith("negative")}
    inputs = {**prompt, "height": 16, "width": 16, "output_type": "pt", **inputs}
    return TinyPipeline(pipe, inputs, first_step=first_step, calls_per_step=calls_per_step, blends=blends)


@tiny
def flux():
    return flux_case(diffusers.FluxPipeline)


@tiny
def flux_true_guidance():
    negative = {key: value for key, value in prompts(8, pooled=8).items() if key.startswith("negative")}
    return flux_case(diffusers.FluxPipeline, calls_per_step=2, true_cfg_scale=2.0, **negative)


@tiny
def flux_img2img():
    return flux_case(diffusers.FluxImg2ImgPipeline, first_step=2, image=picture(), strength=0.5)


@tiny
def flux_kontext():
    return flux_case(diffusers.FluxKontextPipeline, image=picture(), max_area=16 * 16, _auto_resize=False)


@tiny
def flux_inpaint():
    inputs = {"image": picture(), "mask_image": half_mask(), "strength": 0.75}
    return flux_case(diffusers.FluxInpaintPipeline, first_step=1, blends=True, **inputs)


@tiny
def flux_fill():
    # noisy latents, latents of the masked image, and a mask of two by two pixels a latent pixel, packed two by two
    return flux_case(diffusers.FluxFillPipeline, in_channels=16 * 3, image=picture(), mask_image=half_mask())


@tiny
def modular_flux():
    from diffusers.modular_pipelines import FluxAutoBlocks

    case = flux_case(diffusers.FluxPipeline)
    blocks = FluxAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    pipe = blocks.init_pipeline()
    names = ("vae", "transformer", "scheduler")
    pipe.update_components(**{name: case.pipe.components[name] for name in names})
    return TinyPipeline(pipe, {**case.inputs, "output": "images"})


def sd3_case(pipeline, channels=4, first_step=0, blends=False, **inputs):
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=channels,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=8,
        pooled_projection_dim=8,
        out_channels=channels,
    )
    pipe = pipeline(
        **components("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"),
        transformer=transformer,
        scheduler=flow_scheduler(shift=3.0),
        vae=vae(channels, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
    )
    inputs = {**prompts(8, pooled=8), "height": 16, "width": 16, "output_type": "pt", **inputs}
    return TinyPipeline(pipe, inputs, first_step=first_step, blends=blends)


@tiny
def sd3_inpaint():
    inputs = {"image": picture(), "mask_image": half_mask(), "strength": 0.75}
    return sd3_case(diffusers.StableDiffusion3InpaintPipeline, channels=16, first_step=1, blends=True, **inputs)


@tiny
def sd3():
    return sd3_case(diffusers.StableDiffusion3Pipeline)


@tiny
def sd3_img2img():
    return sd3_case(diffusers.StableDiffusion3Img2ImgPipeline, first_step=2, image=picture(), strength=0.5)


def qwen_case(pipeline, first_step=0, **inputs):
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(8, 4, 4),
    )
    pipe = pipeline(
        flow_scheduler(use_dynamic_shifting=True, shift_terminal=0.02),
        wan_vae(diffusers.AutoencoderKLQwenImage),
        None,
        None,
        transformer,
    )
    mask = torch.ones(1, TOKENS, dtype=torch.long)
    prompt = {**prompts(8), "prompt_embeds_mask": mask, "negative_prompt_embeds_mask": mask, "true_cfg_scale": 2.0}
    inputs = {**prompt, "height": 16, "width": 16, "output_type": "pt", **inputs}
    return TinyPipeline(pipe, inputs, calls_per_step=2, first_step=first_step)


@tiny
def qwen_image():
    return qwen_case(diffusers.QwenImagePipeline)


@tiny
def qwen_image_img2img():
    return qwen_case(diffusers.QwenImageImg2ImgPipeline, first_step=2, image=picture(), strength=0.5)


@tiny
def chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(4, 4, 8),
        approximator_hidden_dim=32,
        approximator_layers=1,
        approximator_num_channels=16,
    )
    autoencoder = vae(shift_factor=0.0, use_quant_conv=False, use_post_quant_conv=False)
    pipe = diffusers.ChromaPipeline(flow_scheduler(shift=1.0), autoencoder, None, None, transformer)
    inputs = {**prompts(8), **masks(torch.bool), "height": 16, "width": 16, "output_type": "pt"}
    return TinyPipeline(pipe, inputs, calls_per_step=2)


@tiny
def flux2():
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    autoencoder = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8),
        latent_channels=4,
        norm_num_groups=2,
        layers_per_block=1,
    )
    pipe = diffusers.Flux2Pipeline(flow_scheduler(use_dynamic_shifting=True), autoencoder, None, None, transformer)
    inputs = {"prompt_embeds": embeddings(1, TOKENS, 8), "height": 16, "width": 16, "output_type": "pt"}
    return TinyPipeline(pipe, inputs)


@tiny
def lumina():
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=8,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        cross_attention_dim=8,
    )
    pipe = diffusers.LuminaPipeline(transformer, flow_scheduler(), vae(), None, None)
    inputs = {**prompts(8), **masks(), "height": 32, "width": 32, "clean_caption": False, "output_type": "pt"}
    return TinyPipeline(pipe, inputs)


@tiny
def z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[8, 4, 4],
        axes_lens=[128, 32, 32],
    )
    pipe = diffusers.ZImagePipeline(flow_scheduler(shift=3.0), vae(shift_factor=0.1), None, None, transformer)
    inputs = {"prompt_embeds": [embeddings(TOKENS, 8)], "negative_prompt_embeds": [embeddings(TOKENS, 8, seed=1)]}
    return TinyPipeline(pipe, {**inputs, "height": 16, "width": 16, "output_type": "pt"})


@tiny_with_own_schedule
def cogview4():
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=8,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=8,
        rope_axes_dim=(4, 4),
    )
    scheduler = flow_scheduler(
        use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75, base_image_seq_len=256
    )
    pipe = diffusers.CogView4Pipeline(None, None, vae(), transformer, scheduler)
    inputs = {"prompt_embeds": embeddings(1, 16, 8), "negative_prompt_embeds": embeddings(1, 16, 8, seed=1)}
    return TinyPipeline(pipe, {**inputs, "height": 16, "width": 16, "output_type": "pt"}, calls_per_step=2)


# Flow-matching video models


def ltx_components() -> dict:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=8,
    )
    video_vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return components(
        "text_encoder", "tokenizer", scheduler=flow_scheduler(shift=1.0), vae=video_vae, transformer=transformer
    )


def ltx_inputs() -> dict:
    sizes = {"height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}
    return {**prompts(8), **masks(torch.bool), **sizes}


@tiny
def ltx():
    return TinyPipeline(diffusers.LTXPipeline(**ltx_components()), ltx_inputs(), output="frames")


@tiny
def ltx_image_to_video():
    """Steps a slice of the latents: the first frame stays as it is."""
    pipe = diffusers.LTXImageToVideoPipeline(**ltx_components())
    return TinyPipeline(pipe, {**ltx_inputs(), "image": picture(32)}, output="frames")


@tiny_with_own_schedule
def ltx_condition():
    pipe = diffusers.LTXConditionPipeline(**ltx_components())
    return TinyPipeline(pipe, ltx_inputs(), output="frames", sign=-1)


@tiny_with_own_schedule
def ltx_condition_on_an_image():
    pipe = diffusers.LTXConditionPipeline(**ltx_components())
    inputs = {**ltx_inputs(), "image": picture(32), "frame_index": 0, "strength": 1.0}
    return TinyPipeline(pipe, inputs, output="frames", sign=-1, blends=True)


def wan_transformer(in_channels: int = 4, **kwargs):
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
        **kwargs,
    )


def wan_inputs() -> dict:
    return {**prompts(8), "height": 16, "width": 16, "num_frames": 5, "output_type": "pt"}


@tiny
def wan():
    pipe = diffusers.WanPipeline(
        None, None, vae=wan_vae(), scheduler=flow_scheduler(shift=5.0), transformer=wan_transformer()
    )
    return TinyPipeline(pipe, wan_inputs(), calls_per_step=2, output="frames")


@tiny
def wan_image_to_video():
    # latents, the first frame's latents and a mask of two channels, one for each frame in a latent one
    transformer = wan_transformer(in_channels=10)
    pipe = diffusers.WanImageToVideoPipeline(
        None, None, vae=wan_vae(), scheduler=flow_scheduler(shift=5.0), transformer=transformer
    )
    return TinyPipeline(pipe, {**wan_inputs(), "image": picture()}, calls_per_step=2, output="frames")


@tiny
def chronoedit():
    """Drops frames mid-way, of the latents and of the scheduler's history."""
    transformer = diffusers.ChronoEditTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=10,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
        rope_temporal_skip_len=2,
        image_dim=8,
        added_kv_proj_dim=24,
    )
    pipe = diffusers.ChronoEditPipeline(
        tokenizer=None,
        text_encoder=None,
        image_encoder=None,
        image_processor=None,
        transformer=transformer,
        vae=wan_vae(),
        scheduler=unipc_flow_scheduler(5.0),
    )
    pipe.encode_image = lambda image, device: embeddings(1, 1, 8)
    inputs = {**wan_inputs(), "image": picture(), "num_frames": 9}
    inputs |= {key: embeddings(1, 512, 8) for key in ("prompt_embeds", "negative_prompt_embeds")}  # the padded length
    inputs |= {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 2}
    return TinyPipeline(pipe, inputs, calls_per_step=2, output="frames", blends=True)


@tiny
def skyreels_v2():
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=16,
    )
    pipe = diffusers.SkyReelsV2Pipeline(None, None, transformer, wan_vae(), unipc_flow_scheduler(8.0))
    return TinyPipeline(pipe, wan_inputs(), calls_per_step=2, output="frames")


@tiny
def wan22_two_experts():
    """The first expert takes the noisy steps; the hook counts its calls and those of the second."""
    pipe = diffusers.WanPipeline(
        None,
        None,
        vae=wan_vae(),
        scheduler=flow_scheduler(shift=5.0),
        transformer=wan_transformer(),
        transformer_2=wan_transformer(),
        boundary_ratio=0.7,
    )
    return TinyPipeline(pipe, wan_inputs(), calls_per_step=2, output="frames")


@tiny
def hunyuan_video():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )
    video_vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipe = diffusers.HunyuanVideoPipeline(
        **components("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        transformer=transformer,
        vae=video_vae,
        scheduler=flow_scheduler(shift=7.0),
    )
    inputs = {key: value for key, value in prompts(8, pooled=8).items() if not key.startswith("negative")}
    inputs |= {"prompt_attention_mask": masks()["prompt_attention_mask"], "height": 16, "width": 16, "num_frames": 5}
    return TinyPipeline(pipe, {**inputs, "output_type": "latent"}, output="frames")


class _NoGuardrail:
    def to(self, *args):
        return self


@tiny
def cosmos25():
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4 + 1,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=8,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        rope_scale=(1.0, 1.0, 1.0),
        concat_padding_mask=False,  # the mask is resized with torchvision
        extra_pos_embed_type=None,
        encoder_hidden_states_channels=8,
    )
    pipe = diffusers.Cosmos2_5_PredictBasePipeline(
        None,
        None,
        transformer,
        wan_vae(),
        unipc_flow_scheduler(5.0),
        safety_checker=_NoGuardrail(),
    )
    inputs = {**prompts(8), "height": 16, "width": 16, "num_frames": 5, "output_type": "latent"}
    return TinyPipeline(pipe, inputs, calls_per_step=2, output="frames")
