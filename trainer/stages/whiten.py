"""Whitens the channels of a trained autoencoder's latents, unseen by its pictures.

The transformer's loss counts every latent direction by its variance. Left as trained, most of the
variance is the brightness of the ground, and what tells a cross from a square hides in directions
with a fortieth of it. A linear map of the channels makes all of them weigh the same; it is folded
into the convolutions on both sides of the latents, so the format of the checkpoint stays.
"""

import torch
from diffusers import AutoencoderKL
from torch import Tensor


def whitening(latents: Tensor) -> Tensor:
    """Matrix ``A [C, C]`` after which latents have unit channel covariance and equal means.

    Whitening leaves a rotation free. It is chosen so that the mean of ``A z`` points along
    (1, ..., 1): one scalar ``shift_factor`` then centres every channel.

    Args:
        latents: ``[n, C, h, w]``, not normalised.
    """
    flat = latents.double().movedim(1, 0).flatten(1)
    mean = flat.mean(1)
    values, vectors = torch.linalg.eigh(torch.cov(flat))
    white = (vectors / values.sqrt()) @ vectors.T
    centred: Tensor = _rotation(white @ mean, torch.ones_like(mean)) @ white
    return centred


def fold_into(vae: AutoencoderKL, matrix: Tensor) -> None:
    """Make the encoder give ``A z`` where it gave ``z``, and the decoder take it.

    The posterior's variance becomes one constant per channel: mixed channels are no longer
    independent, and only the posterior's mode is used from here on.
    """
    channels = len(matrix)
    encoder_out, decoder_in = vae.encoder.conv_out, vae.decoder.conv_in
    with torch.no_grad():
        for parameter in (encoder_out.weight, encoder_out.bias):
            mode = parameter[:channels].double()
            parameter[:channels] = torch.einsum("ij,j...->i...", matrix, mode)
        variances = encoder_out.bias[channels:].double().exp()
        encoder_out.bias[channels:] = (matrix.square() @ variances).log()
        encoder_out.weight[channels:] = 0.0
        decoder_in.weight.copy_(
            torch.einsum("oihw,ij->ojhw", decoder_in.weight.double(), torch.linalg.inv(matrix))
        )


def _rotation(start: Tensor, goal: Tensor) -> Tensor:
    """Orthogonal matrix that turns the direction ``start`` into ``goal``: two mirrors."""
    start, goal = start / start.norm(), goal / goal.norm()
    between = start + goal
    assert between.norm() > 1e-6, "opposite directions have no shortest rotation"
    return _mirror(between / between.norm()) @ _mirror(start)


def _mirror(direction: Tensor) -> Tensor:
    eye = torch.eye(len(direction), dtype=direction.dtype)
    return eye - 2 * torch.outer(direction, direction)
