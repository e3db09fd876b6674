"""The calibration dataset: prompts, images, and the latent of every denoising step."""
