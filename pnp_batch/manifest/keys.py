"""The keys that people write: those of other programs, ours for them, and what to write where we have none."""

from __future__ import annotations

# Keys of the public PnP configurations and of their near relatives -> ours.
SETTING_ALIASES = {
    "n_timesteps": "num_inference_steps",
    "ddim_steps": "num_inference_steps",
    "num_ddim_sampling_steps": "num_inference_steps",
    "steps": "num_inference_steps",
    "scale": "guidance_scale",
    "inversion_steps": "num_inversion_steps",
    "source_prompt": "inversion_prompt",
    "cross_replace_steps": "p2p_cross_replace",
    "self_replace_steps": "p2p_self_replace",
    "negative_prompt_alpha": "negative_alpha",
    "negative_prompt_schedule": "negative_schedule",
    "H": "height",
    "W": "width",
}
INPUT_ALIASES = SETTING_ALIASES | {
    "init_img": "image",
    "image_path": "image",
    "target_prompts": "prompts",
    "prompt": "prompts",
}
GENERATE_ALIASES = {
    "source_prompt": "prompt",
    "scale": "guidance_scale",
    "ddim_steps": "num_inference_steps",
    "n_timesteps": "num_inference_steps",
    "num_ddim_sampling_steps": "num_inference_steps",
    "steps": "num_inference_steps",
}
QUALITY_ALIASES = {"min_clip": "min_clip_similarity"}
TOP_ALIASES = {"output_path": "output_dir", "model_id": "model", "model_key": "model"}

AS_FRACTION = "as a fraction of them (40 of 50 is 0.8)"
SHARES_OF_STEPS = ("pnp_f_t", "pnp_attn_t", "sdedit_strength", "p2p_cross_replace", "p2p_self_replace")

# Keys people bring from elsewhere that have no equal here, and what to write instead.
FOREIGN_KEYS = {
    "strength": "PnP has no strength: how much of the source is kept is set by pnp_f_t and pnp_attn_t (0 to 1 each); "
    "with `method: sdedit` write sdedit_strength",
    "feature_injection_threshold": f"it counts steps; write pnp_f_t {AS_FRACTION}",
    "sd_version": "write `model:` with a hub id, a folder or a .safetensors file",
    "device": "write `run: {devices: cuda}`",
    "latents_path": "inversion latents are kept in the store by content; leave this out",
    "exp_name": "results are named after input and prompt; leave this out",
    "experiment_name": "results are named after input and prompt; leave this out",
    "source_experiment_name": "name the picture itself as `image:` in an entry of `inputs`",
    "save_steps": "the inversion latents that are needed are kept by themselves; leave this out",
}
