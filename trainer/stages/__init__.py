"""The kinds of training stage: autoencoder, text encoder, diffusion."""
