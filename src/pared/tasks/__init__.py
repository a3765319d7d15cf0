"""One denoiser, many jobs: what each task gives it, its data, its sampling."""
