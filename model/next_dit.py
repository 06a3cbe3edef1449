"""The Unified Next-DiT of Lumina-Image 2.0 on packed ragged sequences.

Caption and image tokens of one sample form one sequence; all sequences of a batch are one run of
tokens. There is no padding and no mask, so one image, a mixed-resolution batch, CFG branches and
training share one code path. Architecture: arXiv 2503.21758, section 3.1.

Shapes: n = samples, C = latent channels, L_i = caption tokens, T = tokens of all samples.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import checkpoint
from model.adapters import Adapted, Adapters, Linear, adapter_order, spans_of
from model.attention import Backend, choose_backend
from model.config import NextDiTConfig
from model.layers import Block, CaptionEmbedder, FinalLayer, TimestepEmbedder
from model.modulation import Modulation
from model.packing import Layout, PackedSequences, RotaryTables, upload
from model.precision import precision_name
from model.stack import EagerStack, StackInput, StackRunner


class NextDiT(nn.Module):
    """Predicts the velocity ``data - noise`` of latents at a timestep (0 = noise, 1 = data).

    The forward is four public stages, because serving runs them apart: the context once per
    request, and the joint blocks only where a cached result cannot stand in.

    Attributes:
        residual_dtype: of the stream through the joint blocks; None: what the weights make of it.
        run_stack: computes the modulated blocks; eager unless `model.acceleration` says otherwise.
    """

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__()
        self.config = config
        self.residual_dtype: torch.dtype | None = None
        self.run_stack: StackRunner = EagerStack()
        self.x_embedder = Linear(config.patch_dim, config.hidden_size)
        self.time_embedder = TimestepEmbedder(config.modulation_dim)
        self.caption_embedder = CaptionEmbedder(config)
        refiners = range(config.num_refiner_layers)
        self.context_refiner = nn.ModuleList([Block(config, modulated=False) for _ in refiners])
        self.noise_refiner = nn.ModuleList([Block(config, modulated=True) for _ in refiners])
        self.layers = nn.ModuleList(
            [Block(config, modulated=True) for _ in range(config.num_layers)]
        )
        self.final_layer = FinalLayer(config)
        self.rotary = RotaryTables(config)
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.name = name
        self.initialize_weights()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.x_embedder.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.x_embedder.weight.dtype

    @property
    def precision(self) -> str:
        """The name of its arithmetic, as in `model.precision`."""
        return precision_name(self.dtype, self.residual_dtype or self.dtype)

    @property
    def attention(self) -> Backend:
        """What attends on the device and in the dtype at hand.

        Raises:
            ValueError: one sentence, when the environment forces a backend that cannot be used.
        """
        device, dtype = self.device, self.dtype
        if device.type in ("cpu", "cuda") and torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return choose_backend(device, dtype, self.config.head_dim)

    def forward(
        self,
        latents: Sequence[Tensor],
        timesteps: Tensor,
        prompt_embeds: Sequence[Tensor],
        adapters: Sequence[Adapters] | None = None,
    ) -> list[Tensor]:
        """Velocity of every sample.

        Args:
            latents: n tensors ``[C, H_i, W_i]``, sides multiples of the patch size.
            timesteps: ``[n]`` in [0, 1], 0 = noise.
            prompt_embeds: n tensors ``[L_i, cap_feat_dim]``, valid tokens only.
            adapters: the LoRAs of each sample; None: none anywhere. Inference only.

        Returns:
            n tensors ``[C, H_i, W_i]``.

        Raises:
            ValueError: when shapes do not fit the model.
        """
        contexts = self.encode_context(prompt_embeds, adapters)
        return self.head(self.blocks(self.embed(latents, timesteps, contexts, adapters)))

    def encode_context(
        self, prompt_embeds: Sequence[Tensor], adapters: Sequence[Adapters] | None = None
    ) -> list[Tensor]:
        """Embed and refine captions; independent of time, so once per request and branch.

        Args:
            prompt_embeds: tensors ``[L_i, cap_feat_dim]``.
            adapters: the LoRAs of each; a context is one request's, so it carries them.

        Returns:
            tensors ``[L_i, d]``.
        """
        if len(prompt_embeds) == 0:
            raise ValueError("a batch needs at least one caption; prompt_embeds is empty")
        for features in prompt_embeds:
            if features.ndim != 2 or features.shape[1] != self.config.cap_feat_dim:
                raise ValueError(
                    f"prompt_embeds of shape {list(features.shape)} must be "
                    f"[tokens, {self.config.cap_feat_dim}]"
                )
        lengths = [features.shape[0] for features in prompt_embeds]
        attend = self.attention.plan(Layout.of(lengths, self.device))
        adapted = Adapted.of(adapters or [()] * len(lengths), lengths)
        tables = [self.rotary.caption(length, self.device) for length in lengths]
        cos, sin = (torch.cat(parts) for parts in zip(*tables, strict=True))
        features = torch.cat(list(prompt_embeds)).to(self.device, self.dtype)
        hidden = self.caption_embedder(features, adapted.tokens)
        for block in self.context_refiner:
            hidden = block(hidden, attend, cos, sin, adapted=adapted)
        return list(hidden.split(lengths))

    def embed(
        self,
        latents: Sequence[Tensor],
        timesteps: Tensor,
        contexts: Sequence[Tensor],
        adapters: Sequence[Adapters] | None = None,
        modulation: Modulation | None = None,
    ) -> PackedSequences:
        """Patchify, refine the noisy image tokens and pack them behind their captions.

        Args:
            latents: n tensors ``[C, H_i, W_i]``.
            timesteps: ``[n]`` in [0, 1].
            contexts: n tensors ``[L_i, d]`` of :meth:`encode_context`, with the same adapters.
            adapters: the LoRAs of each sample; None: none anywhere.
            modulation: looked up for these adapters and timesteps, which then do not count.
        """
        self._check_batch(latents, timesteps, contexts)
        own = adapters or [()] * len(latents)
        order = _packing_order(latents, contexts, own)
        own = [own[i] for i in order]
        latents = [latents[i] for i in order]
        contexts = [contexts[i] for i in order]
        grids = [self._grid(x) for x in latents]
        image_cos, image_sin, lengths = self._image_rotary(grids, contexts)
        adapted = Adapted.of(own, lengths)
        rows, time_embedding = None, None
        if modulation is None:
            time_embedding = self._time_embedding(timesteps, order, adapted)
        else:
            rows = [modulation.rows[i] for i in order]

        image_layout = Layout.of(lengths, self.device)
        index, attend = image_layout.sequence_index(rows), self.attention.plan(image_layout)
        image = self.x_embedder(self._patchify(latents), adapted.tokens)
        cos, sin = torch.cat(image_cos), torch.cat(image_sin)
        folded = None if modulation is None else modulation.noise_refiner
        given = StackInput(
            image, image_layout, attend, cos, sin, index, time_embedding, folded, adapted
        )
        image = self.run_stack(self.noise_refiner, given)

        caption_tables = [self.rotary.caption(c.shape[0], self.device) for c in contexts]
        layout = Layout.of(
            [c.shape[0] + n for c, n in zip(contexts, lengths, strict=True)], self.device
        )
        hidden = _interleave([c.to(image.dtype) for c in contexts], image.split(lengths))
        return PackedSequences(
            hidden=hidden.to(self.residual_dtype or hidden.dtype),
            layout=layout,
            attend=self.attention.plan(layout),
            cos=_interleave([c for c, _ in caption_tables], image_cos),
            sin=_interleave([s for _, s in caption_tables], image_sin),
            time_embedding=time_embedding,
            modulation=modulation,
            sequence_index=layout.sequence_index(rows),
            grids=tuple(grids),
            order=tuple(order),
            adapters=tuple(own),
        )

    def blocks(self, packed: PackedSequences) -> PackedSequences:
        """Run the joint blocks over captions and images together."""
        hidden = self.run_stack(
            self.layers,
            StackInput(
                hidden=packed.hidden,
                layout=packed.layout,
                attend=packed.attend,
                cos=packed.cos,
                sin=packed.sin,
                sequence_index=packed.sequence_index,
                time_embedding=packed.time_embedding,
                folded=None if packed.modulation is None else packed.modulation.layers,
                adapted=packed.adapted,
            ),
        )
        return replace(packed, hidden=hidden)

    def joint_signals(self, packed: PackedSequences, places: Sequence[int]) -> list[Tensor]:
        """Modulated inputs ``[T_i, d]`` of the first joint block, for the sequences at `places`.

        How much they change from step to step tells how much the joint blocks' output will.
        """
        first = self.layers[0]
        assert isinstance(first, Block)
        modulation, d = packed.modulation, self.config.hidden_size
        sequences = packed.hidden.split(packed.layout.lengths)
        signals = []
        for place in places:
            if modulation is None:
                assert packed.time_embedding is not None
                scaled, _ = first.fold(
                    packed.time_embedding[place : place + 1],
                    packed.hidden.dtype,
                    spans_of([packed.adapters[place]], [1]),
                )
            else:
                row = modulation.rows[packed.order[place]]
                scaled = modulation.layers[0][0][row : row + 1]
            signals.append(first.attention_norm1(sequences[place], scaled[:, :d]))
        return signals

    def head(self, packed: PackedSequences) -> list[Tensor]:
        """Project image tokens back to velocities ``[C, H_i, W_i]``, in the caller's order."""
        adapted = packed.adapted
        if packed.modulation is None:
            assert packed.time_embedding is not None
            scale = self.final_layer.scale(packed.time_embedding, adapted.sequences)
        else:
            scale = packed.modulation.final
        tokens = self.final_layer(packed.hidden, scale, packed.sequence_index, adapted.tokens)
        velocities: list[Tensor | None] = [None] * len(packed.order)
        sequences = tokens.split(packed.layout.lengths)
        for place, sequence, grid in zip(packed.order, sequences, packed.grids, strict=True):
            velocities[place] = self._unpatchify(sequence[-grid[0] * grid[1] :], grid)
        return [v for v in velocities if v is not None]

    def _time_embedding(self, timesteps: Tensor, order: Sequence[int], adapted: Adapted) -> Tensor:
        """What modulations are made of, ``[n, e]``, in the packed order."""
        places = upload(torch.tensor(order, device="cpu"), self.device)
        times = upload(timesteps, self.device)[places]
        return F.silu(self.time_embedder(times, adapted.sequences))

    def _check_batch(
        self, latents: Sequence[Tensor], timesteps: Tensor, contexts: Sequence[Tensor]
    ) -> None:
        if not len(latents) == len(contexts) == timesteps.numel() or not latents:
            raise ValueError(
                f"a batch needs equally many latents, timesteps and captions, at least one; got "
                f"{len(latents)}, {timesteps.numel()} and {len(contexts)}"
            )
        if timesteps.ndim != 1:
            raise ValueError(f"timesteps of shape {list(timesteps.shape)} must be [{len(latents)}]")
        for context in contexts:
            if context.ndim != 2 or context.shape[1] != self.config.hidden_size:
                raise ValueError(
                    f"contexts of shape {list(context.shape)} must be "
                    f"[tokens, {self.config.hidden_size}]"
                )
        p, channels = self.config.patch_size, self.config.in_channels
        for x in latents:
            patches = x.ndim == 3 and not (x.shape[1] % p or x.shape[2] % p) and x.numel() > 0
            if not patches or x.shape[0] != channels:
                raise ValueError(
                    f"latents of shape {list(x.shape)} must be [{channels}, H, W] with H and W "
                    f"positive multiples of {p}"
                )

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        p = self.config.patch_size
        return latents.shape[1] // p, latents.shape[2] // p

    def _image_rotary(
        self, grids: Sequence[tuple[int, int]], contexts: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[int]]:
        """Rotary tables of each image after its caption, and the image token counts."""
        tables = [
            self.rotary.image(context.shape[0], rows, columns, self.device)
            for context, (rows, columns) in zip(contexts, grids, strict=True)
        ]
        lengths = [rows * columns for rows, columns in grids]
        return [cos for cos, _ in tables], [sin for _, sin in tables], lengths

    def _patchify(self, latents: Sequence[Tensor]) -> Tensor:
        """Tokens ``[T, p*p*C]``, row-major; inside a token (patch row, patch column, channel)."""
        p, channels = self.config.patch_size, self.config.in_channels
        parts = []
        for shape, group in groupby(latents, key=lambda x: x.shape):
            batch = torch.stack(list(group)).to(self.device, self.dtype)
            batch = batch.view(-1, channels, shape[1] // p, p, shape[2] // p, p)
            parts.append(batch.permute(0, 2, 4, 3, 5, 1).reshape(-1, self.config.patch_dim))
        return torch.cat(parts)

    def _unpatchify(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        p, channels = self.config.patch_size, self.config.in_channels
        patches = tokens.view(*grid, p, p, channels).permute(4, 0, 2, 1, 3)
        return patches.reshape(channels, grid[0] * p, grid[1] * p)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """The official initialisation: modulations and the output are zero, blocks identities.

        The untrained network therefore predicts exactly 0.
        """
        if self.x_embedder.weight.is_meta:
            return  # nothing to fill, and torch would import its compiler to do so: 150 MB, seconds
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.time_embedder.linear_1.weight, std=0.02)
        nn.init.normal_(self.time_embedder.linear_2.weight, std=0.02)
        nn.init.trunc_normal_(self.caption_embedder.linear.weight, std=0.02)
        for block in (*self.noise_refiner, *self.layers):
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.final_layer.modulation.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        residual_dtype: torch.dtype | None = None,
    ) -> "NextDiT":
        """Load diffusers' ``config.json`` and safetensors (sharded too) from ``folder``.

        Args:
            folder: of the transformer.
            device: where the weights go.
            dtype: of the weights.
            residual_dtype: of the stream through the joint blocks, if wider than ``dtype``.

        Raises:
            CheckpointError: one line naming the file and the fault.
        """
        folder = Path(folder)
        config = checkpoint.load_transformer_config(folder)
        with torch.device("meta"):
            dit = cls(config)
        expected = {key: tuple(value.shape) for key, value in dit.state_dict().items()}
        weights = checkpoint.load_transformer(folder, expected, device=device, dtype=dtype)
        dit.load_state_dict(weights, assign=True)
        dit.residual_dtype = residual_dtype
        dit.rotary = RotaryTables(config)  # the one made above may hold meta tensors
        return dit.eval().requires_grad_(False)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config and weights as diffusers names them; ``dtype`` converts on the way."""
        checkpoint.save_transformer(Path(folder), self.config, self.state_dict(), dtype)


def _packing_order(
    latents: Sequence[Tensor], contexts: Sequence[Tensor], adapters: Sequence[Adapters]
) -> list[int]:
    """Indices of the samples, those with equal adapters together and in these equal sizes."""
    return sorted(
        range(len(latents)),
        key=lambda i: (adapter_order(adapters[i]), *latents[i].shape[1:], len(contexts[i])),
    )


def _interleave(captions: Sequence[Tensor], images: Sequence[Tensor]) -> Tensor:
    """Concatenate caption 0, image 0, caption 1, image 1, … along the tokens."""
    return torch.cat([t for pair in zip(captions, images, strict=True) for t in pair])
