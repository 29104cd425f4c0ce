"""CogVideoX of diffusers, as it reads a pipeline folder on its own: features of text, one step, one video.

Started by benchmarks/released.py; nothing of ours is imported. Reads given.npz of a folder, writes found.npz there.
"""

import json
import sys
from pathlib import Path

try:
    import diffusers
    import numpy as np
    import torch
    import transformers
except ImportError as error:
    sys.exit(f"{sys.executable} has no {error.name}: pip install torch diffusers transformers there")


@torch.no_grad()
def main(folder: Path, work: Path, job: dict) -> None:
    local = {"local_files_only": True}  # or else a folder that is not as diffusers names it is looked for on the hub
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, given, found = getattr(torch, job["dtype"]), dict(np.load(work / "given.npz")), {}
    if (folder / "text_encoder" / "config.json").is_file():
        t5 = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype, **local).to(device)
        found["text"] = t5(torch.from_numpy(given["ids"]).long().to(device))[0].float().cpu().numpy()
        del t5
    transformer = diffusers.CogVideoXTransformer3DModel.from_pretrained(
        folder / "transformer", torch_dtype=dtype, **local
    )
    transformer = transformer.to(device)
    noise = torch.from_numpy(given["noise"].copy()).to(device, dtype)
    caption, null = torch.from_numpy(given["text"]).to(device, dtype).split(1)
    has_vae = (folder / "vae" / "config.json").is_file()
    kind = diffusers.AutoencoderKLCogVideoX
    vae = kind.from_pretrained(folder / "vae", torch_dtype=dtype, **local).to(device) if has_vae else None
    if (folder / "scheduler" / "scheduler_config.json").is_file():
        scheduler = diffusers.CogVideoXDDIMScheduler.from_pretrained(folder / "scheduler", **local)
    else:
        options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
        scheduler = diffusers.CogVideoXDDIMScheduler(**options, snr_shift_scale=1.0)
    pipeline = diffusers.CogVideoXPipeline(None, None, vae, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    rotary = pipeline._prepare_rotary_positional_embeddings(job["height"], job["width"], noise.shape[1], device)
    time = torch.full((1,), job["timestep"], device=device)
    found["step"] = (
        transformer(noise, caption, time, image_rotary_emb=rotary, return_dict=False)[0].float().cpu().numpy()
    )
    if has_vae:
        options = {"guidance_scale": job["guidance"], "use_dynamic_cfg": job["dynamic"], "latents": noise}
        options |= {"num_inference_steps": job["steps"], "num_frames": job["frames"]}
        options |= {"height": job["height"], "width": job["width"], "return_dict": False, "output_type": "latent"}
        latents = pipeline(prompt_embeds=caption, negative_prompt_embeds=null, **options)[0]
        video = pipeline.video_processor.postprocess_video(video=pipeline.decode_latents(latents), output_type="np")
        found |= {"latents": latents.float().cpu().numpy(), "video": np.asarray(video)}
    np.savez(work / "found.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
