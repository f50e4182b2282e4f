"""Diffusion models: ELBO and per-step likelihoods of images."""
