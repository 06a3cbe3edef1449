"""Every operator in one form: how to draw its inputs, launch its kernel, and what is right.

Widths are features of a token; for heads, of one head.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gate_residual_norm import (
    gate_residual,
    gate_residual_norm,
    gate_residual_norm_ref,
    gate_residual_ref,
)
from kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from kernels.rms_norm import rms_norm, rms_norm_ref
from kernels.silu_mul import silu_mul, silu_mul_ref
from tests.kernels.yardstick import draw

EPS = 1e-5
SEQUENCES = 3
HEADS, KV_HEADS = 11, 3  # neither fills the heads of a program
BY_TOKEN = {"x", "token_weight", "branch", "residual", "q", "k", "cos", "sin", "gate_up", "index"}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Operator:
    """One way to call an operator.

    Attributes:
        inputs: of so many tokens, of this width, with narrow and wide dtypes.
        public: what the model calls.
        reference: the eager operator.
        exact: the same in float64, written down independently.
        outputs: empty results for these inputs.
        launch: writes the results, given these and the inputs.
    """

    inputs: Callable[[int, int, torch.dtype, torch.dtype], Inputs]
    public: Callable[..., object]
    reference: Callable[..., object]
    exact: Callable[..., object]
    outputs: Callable[[Inputs], list[Tensor]]
    launch: Callable[[list[Tensor], Inputs], None]

    def poisoned(self, inputs: Inputs) -> list[Tensor]:
        """What the kernel makes of outputs that were NaN everywhere."""
        outputs = [out.fill_(float("nan")) for out in self.outputs(inputs)]
        self.launch(outputs, inputs)
        return outputs


def listed(result: object) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def outliers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers, some of them a hundred times larger, in rows of very different size."""
    x = draw(*shape, seed=seed)
    x[..., ::13] *= 100.0
    if shape[0] > 2:
        x[1] *= 1e-3
        x[2] *= 30.0
    return x.to(dtype)


def token_index(tokens: int) -> Tensor:
    """Sequences in packed order, of unequal lengths."""
    return (torch.arange(tokens) * SEQUENCES // max(tokens, 1)).clamp(max=SEQUENCES - 1)


def norm64(x, weight):
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def by_row(weight, index):
    return weight if index is None else weight[index]


def rms_inputs(kind):
    def inputs(tokens, width, narrow, wide):
        found = {"x": outliers(tokens, width, seed=1, dtype=wide)}
        if kind == "sequence":
            found |= {"weight": draw(SEQUENCES, width, seed=2, dtype=narrow)}
            return found | {"index": token_index(tokens)}
        shape = (tokens, width) if kind == "token" else (width,)
        name = "token_weight" if kind == "token" else "weight"
        return found | {name: draw(*shape, seed=2, dtype=narrow)}

    return inputs


def rms_operator(kind):
    from_args = {"token_weight": "weight"}

    def named(function):
        return lambda **given: function(**{from_args.get(n, n): v for n, v in given.items()})

    def outputs(given):
        weight = given.get("weight", given.get("token_weight"))
        return [torch.empty(given["x"].shape, dtype=weight.dtype, device=weight.device)]

    def launch(out, given):
        from kernels.gpu.rms_norm import launch_rms_norm

        weight = given.get("weight", given.get("token_weight"))
        launch_rms_norm(out[0], given["x"], weight, EPS, given.get("index"))()

    return Operator(
        inputs=rms_inputs(kind),
        public=named(lambda **given: rms_norm(**given, eps=EPS)),
        reference=named(lambda **given: rms_norm_ref(**given, eps=EPS)),
        exact=named(lambda x, weight, index=None: norm64(x, by_row(weight, index))),
        outputs=outputs,
        launch=launch,
    )


def residual_inputs(indexed, scaled):
    def inputs(tokens, width, narrow, wide):
        rows = (SEQUENCES, 2 * width) if indexed else (2 * width,)
        found = {
            "branch": outliers(tokens, width, seed=1, dtype=narrow),
            "residual": outliers(tokens, width, seed=2, dtype=wide),
            "gate": draw(*rows, seed=3, dtype=wide)[..., width:],
        }
        if scaled:
            found |= {"scale": draw(*rows, seed=4, dtype=narrow)[..., :width]}
        return found | ({"index": token_index(tokens)} if indexed else {})

    return inputs


def residual_exact(branch, residual, gate, scale=None, index=None):
    stream = residual.double() + norm64(branch, by_row(gate, index))
    return stream if scale is None else (stream, norm64(stream, by_row(scale, index)))


def residual_operator(indexed, scaled):
    public = gate_residual_norm if scaled else gate_residual
    reference = gate_residual_norm_ref if scaled else gate_residual_ref

    def outputs(given):
        residual, scale = given["residual"], given.get("scale")
        stream = torch.empty_like(residual, memory_format=torch.contiguous_format)
        return [stream, torch.empty_like(stream, dtype=scale.dtype)] if scaled else [stream]

    def launch(out, given):
        from kernels.gpu.gate_residual_norm import launch_gate_residual_norm

        launch_gate_residual_norm(
            out[0], out[1] if scaled else None, given["branch"], given["residual"],
            given["gate"], given.get("scale"), EPS, given.get("index"),
        )()  # fmt: skip

    return Operator(
        inputs=residual_inputs(indexed, scaled),
        public=lambda **given: public(**given, eps=EPS),
        reference=lambda **given: reference(**given, eps=EPS),
        exact=residual_exact,
        outputs=outputs,
        launch=launch,
    )


def rope_inputs(tokens, width, narrow, wide):
    width += width % 2
    heads = outliers(tokens, HEADS + 2 * KV_HEADS, width, seed=1, dtype=narrow)
    q, k, _ = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    angles = draw(tokens, width // 2, seed=4) * 30
    weights = {f"{n}_weight": draw(width, seed=s, dtype=narrow) for n, s in (("q", 2), ("k", 3))}
    return {"q": q, "k": k, **weights, "cos": angles.cos(), "sin": angles.sin()}


def rope_exact(q, k, q_weight, k_weight, cos, sin):
    def turned(x, weight):
        normed = norm64(x, weight)
        pairs = torch.complex(normed[..., 0::2].contiguous(), normed[..., 1::2].contiguous())
        return torch.view_as_real(
            pairs * torch.complex(cos.double(), sin.double())[:, None]
        ).flatten(-2)

    return turned(q, q_weight), turned(k, k_weight)


def rope_launch(out, given):
    from kernels.gpu.qk_norm_rope import launch_qk_norm_rope

    launch_qk_norm_rope(*out, **given, eps=EPS)()


def silu_exact(gate_up):
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def silu_launch(out, given):
    from kernels.gpu.silu_mul import launch_silu_mul

    launch_silu_mul(out[0], given["gate_up"])()


OPERATORS = {
    "rms_norm": rms_operator("all"),
    "rms_norm by sequence": rms_operator("sequence"),
    "rms_norm by token": rms_operator("token"),
    "gate_residual_norm": residual_operator(indexed=True, scaled=True),
    "gate_residual_norm, one weight": residual_operator(indexed=False, scaled=True),
    "gate_residual": residual_operator(indexed=True, scaled=False),
    "qk_norm_rope": Operator(
        inputs=rope_inputs,
        public=lambda **given: qk_norm_rope(**given, eps=EPS),
        reference=lambda **given: qk_norm_rope_ref(**given, eps=EPS),
        exact=rope_exact,
        outputs=lambda given: [given[name].new_empty(given[name].shape) for name in ("q", "k")],
        launch=rope_launch,
    ),
    "silu_mul": Operator(
        inputs=lambda tokens, width, narrow, _: {
            "gate_up": outliers(tokens, 2 * width, seed=1, dtype=narrow) * 0.3
        },
        public=silu_mul,
        reference=silu_mul_ref,
        exact=silu_exact,
        outputs=lambda given: [
            given["gate_up"].new_empty(len(given["gate_up"]), given["gate_up"].shape[-1] // 2)
        ],
        launch=silu_launch,
    ),
}
