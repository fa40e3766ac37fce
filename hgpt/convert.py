"""Turn a trained softmax model into a harmonic one that predicts nearly the same.

    python -m hgpt.convert MODEL --exponent 4*sqrt_dim --data DIR --out FOLDER

Let h be the input of the output embedding, and s_i = w_i·h + b_i its logits. Only differences of logits count, so with
the mean μ of h, any vector c and any invertible T

    s_i = x·u_i + a_i + (the same for all i),    x = (h − μ) T,  u_i = (w_i − c) T⁻ᵀ,  a_i = b_i + w_i·μ

The centres are (u_i, r_i) and hidden states (x, 0), with D + 1 coordinates, so d_i² = |x|² + |u_i|² + r_i² − 2 x·u_i.
With X the mean of |x|² and A_i = X + |u_i|² + r_i² the score of HarMax is, as long as |x|² is near X,

    −n log d_i = −(n/2) log A_i + (n/A_i) x·u_i + O(n (x·u_i / A_i)²)

So r_i is chosen to make A_i = n, and the log-weight is the constant part, a_i + (n/2) log A_i. The error falls as 1/n.
A_i = n needs r_i² = n − X − |u_i|² ≥ 0; if that is negative, r_i = 0, and the slope n/A_i is below 1. T makes X and
|u_i|² small: T Tᵀ = Σ_h⁻¹ # Σ_w, the geometric mean of covariances. For small n, where x·u_i / A_i is not small,
A_i = κ n with κ > 1 is better; the κ with the least divergence from softmax is used.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from hgpt.cli import Parser, run
from hgpt.data.batches import num_windows, read_windows
from hgpt.data.shards import SPLITS, TokenShards
from hgpt.durable import whole_folder
from hgpt.errors import UserError
from hgpt.model.harmax import resolve_exponent, squared_distances
from hgpt.model.harmonized import Backbone, HarmonizedForCausalLM, check_backbone, harmonize, output_embedding
from hgpt.run.model_card import model_card
from hgpt.source import check_tokenizer, find_source

MULTIPLES = (1, 2, 4, 8, 16)  # of the exponent, in the table
FLATTER = (0.9, 3.0)  # bounds of κ
CHUNK = 128  # positions whose logits are in memory


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """The last layer of a softmax model: rows w (V, D), biases b (V,), and its inputs h (N, D)."""

    w: Tensor
    b: Tensor
    h: Tensor

    def logits(self, h: Tensor) -> Tensor:
        return h @ self.w.T + self.b


@dataclass(frozen=True, kw_only=True)
class Lift:
    """x = L h + l, in D + 1 dimensions, centres (V, D + 1) and log-weights (V,), for the exponent n."""

    n: float
    matrix: Tensor
    offset: Tensor
    centres: Tensor
    log_weight: Tensor

    def logits(self, h: Tensor) -> Tensor:
        d_sq = squared_distances(h @ self.matrix.T + self.offset, self.centres)
        return self.log_weight - 0.5 * self.n * d_sq.log()


def root(matrix: Tensor, power: float) -> Tensor:
    """A power of a symmetric positive semi-definite matrix; eigenvalues are clamped at 1e-6 of their mean."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(1e-6 * values.mean()) ** power @ vectors.T


@dataclass(frozen=True, kw_only=True)
class Balanced:
    """T, μ, u and the a_i of a softmax layer, and the mean of |x|² and every |u_i|², in float64."""

    t: Tensor
    mean: Tensor
    u: Tensor
    a: Tensor
    x_sq: Tensor
    u_sq: Tensor


def balance(softmax: Softmax) -> Balanced:
    """T is symmetric, and makes the means of |x|² and |u_i|² equal."""
    w, h = softmax.w.double(), softmax.h.double()
    cov_h, cov_w, mean = torch.cov(h.T, correction=0), torch.cov(w.T, correction=0), h.mean(0)
    half, inverse = root(cov_h, 0.5), root(cov_h, -0.5)
    t = root(inverse @ root(half @ cov_w @ half, 0.5) @ inverse, 0.5)
    u = (w - w.mean(0)) @ torch.linalg.inv(t)
    x_sq, u_sq = ((h - mean) @ t).square().sum(1).mean(), u.square().sum(1)
    return Balanced(t=t, mean=mean, u=u, a=softmax.b.double() + w @ mean, x_sq=x_sq, u_sq=u_sq)


def lift(balanced: Balanced, n: float, flatter: float = 1.0, dtype: torch.dtype = torch.float64) -> Lift:
    """The lift for the exponent n, with κ = `flatter`, computed in float64."""
    least, t = balanced.x_sq + balanced.u_sq, balanced.t
    r_sq = (flatter * n - least).clamp_min(0)
    log_weight = balanced.a + 0.5 * n * (least + r_sq).log()
    return Lift(
        n=n,
        matrix=torch.cat((t.T, torch.zeros_like(t[:1]))).to(dtype),
        offset=torch.cat((-balanced.mean @ t, t.new_zeros(1))).to(dtype),
        centres=torch.cat((balanced.u, r_sq.sqrt()[:, None]), dim=1).to(dtype),
        log_weight=(log_weight - log_weight.mean()).to(dtype),
    )


def best_lift(softmax: Softmax, balanced: Balanced, n: float) -> Lift:
    """The lift with the κ in `FLATTER` that has the least divergence on some of `softmax.h`; in w's dtype."""
    sample, dtype = softmax.h[:: -(-len(softmax.h) // 256)], softmax.w.dtype

    def divergence(flatter: float) -> float:
        return compare(softmax, lift(balanced, n, flatter, dtype), sample)[0]

    found = minimize_scalar(divergence, bounds=FLATTER, method="bounded", options={"xatol": 0.01, "maxiter": 12})
    return lift(balanced, n, found.x, dtype)


@torch.no_grad()
def compare(
    softmax: Softmax, lifted: Lift | Softmax, h: Tensor, targets: Tensor | None = None
) -> tuple[float, float, float]:
    """Means over positions: KL(softmax ‖ lifted) in nats, top-1 agreement, −log p_target."""
    sums = torch.zeros(3, dtype=torch.float64)
    for rows in torch.arange(len(h)).split(CHUNK):
        before, after = (layer.logits(h[rows]).log_softmax(-1) for layer in (softmax, lifted))
        sums[0] += (before.exp() * (before - after)).sum().double()
        sums[1] += (before.argmax(-1) == after.argmax(-1)).sum()
        if targets is not None:
            sums[2] -= after.gather(1, targets[rows, None]).sum().double()
    kl, agreement, loss = (sums / len(h)).tolist()
    return kl, agreement, loss


# ----------------------------------------------------------------------------------------------------------------------
# Models


def with_linear_output(model: Any) -> Any:
    """`model` with a linear output embedding: a backbone with our softmax head gets that head as an `nn.Linear`."""
    if not isinstance(model, HarmonizedForCausalLM):
        return model
    trunk: Backbone = model.transformer
    gain, head, width = trunk.ln_f, model.lm_head, model.config.get_text_config().hidden_size
    linear = nn.Linear(width, len(head.weight), dtype=head.weight.dtype)
    with torch.no_grad():
        x = torch.cat((torch.eye(width), torch.zeros(1, width))).to(head.weight)  # each coordinate, and the origin
        logits = gain(x) @ head.weight.T + (0 if head.log_weight is None else head.log_weight)
        linear.weight.copy_((logits[:-1] - logits[-1]).T)
        linear.bias.copy_(logits[-1])
    linear.num_classes = head.num_classes
    trunk.set_output_embedding(linear)
    return trunk.model


@torch.no_grad()
def hidden_states(model: Any, shards: TokenShards, positions: int) -> tuple[Tensor, Tensor]:
    """Inputs of the output embedding at about `positions` positions of a split, (N, D), and the next tokens, (N,)."""
    length = min(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024, 1024)
    windows = num_windows(len(shards), length)
    count = min(windows, -(-positions // length))
    if count == 0:
        raise UserError(f"{shards.folder}: the {shards.split} split is shorter than {length + 1} tokens: prepare more")
    seen: list[Tensor] = []
    hook = output_embedding(model).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0]))
    targets = []
    for window in (i * windows // count for i in range(count)):
        inputs, following = read_windows(shards, [window], length)
        model(input_ids=inputs)
        targets.append(following[0])
    hook.remove()
    return torch.cat(seen), torch.cat(targets)


def last_layer(model: Any, h: Tensor) -> Softmax:
    head = output_embedding(model)
    vocab = getattr(head, "num_classes", len(head.weight))  # the other rows are padding
    bias = getattr(head, "log_weight", None) if getattr(head, "bias", None) is None else head.bias
    w = head.weight[:vocab].detach().clone()
    return Softmax(w=w, b=w.new_zeros(vocab) if bias is None else bias[:vocab].detach().clone(), h=h)


@torch.no_grad()
def lifted_model(model: Any, found: Lift) -> HarmonizedForCausalLM:
    """`model` with the lift instead of its output embedding. Changes `model` in place."""
    lifted = harmonize(model, found.n, vocab_size=len(found.centres), radius="learned", lift=True)
    vocab, projection, head = len(found.centres), lifted.transformer.ln_f, lifted.lm_head
    projection.weight.copy_(found.matrix)
    projection.bias.copy_(found.offset)
    for parameter, values in ((head.weight, found.centres), (head.log_weight, found.log_weight)):
        parameter.zero_()
        parameter[:vocab] = values
    return lifted


def main(arguments: Sequence[str]) -> str:
    """Convert, save, and return the table of divergences. Raises UserError."""
    parser = Parser("python -m hgpt.convert", __doc__)
    add = parser.add_argument
    add("model", metavar="MODEL", help="run, checkpoint, exported model or id on the Hugging Face hub")
    add("--exponent", default="4*sqrt_dim", help="n: a number, or a multiple of √D (default: %(default)s)")
    add("--data", required=True, metavar="DIR", help="data folder, for hidden states and for the divergence")
    add("--out", required=True, metavar="FOLDER", help="new folder for the harmonic model")
    add("--positions", type=int, default=16384, help="positions of each split to look at (default: %(default)s)")
    options = parser.parse_args(arguments)
    if os.path.exists(options.out):
        raise UserError(f"--out {options.out} already exists: name a new folder")
    if options.positions < 1:
        raise UserError(f"--positions must be at least 1; got {options.positions}")
    source = find_source(options.model)
    if getattr(source.load_config(), "head", None) == "harmonic":
        raise UserError(f"{options.model} already has a harmonic head: there is nothing to convert")
    model, tokenizer = source.load(torch.float32)
    model = with_linear_output(model.eval())
    try:
        causal = not type(model).__name__.endswith("ForMaskedLM")
        check_backbone(model, output_embedding(model), causal=causal)
        n = resolve_exponent(options.exponent, output_embedding(model).weight.shape[1])
    except ValueError as error:
        raise UserError(f"{options.model} cannot be converted: {error}") from error
    train, val = (TokenShards.open(options.data, split, None) for split in SPLITS)
    if train.vocab_size > len(output_embedding(model).weight):
        raise UserError(f"{options.data} has {train.vocab_size} tokens, more than {options.model} has")
    print(check_tokenizer(options.model, train, "MODEL"), file=sys.stderr)
    softmax = last_layer(model, hidden_states(model, train, options.positions)[0])
    h, targets = hidden_states(model, val, options.positions)
    balanced = balance(softmax)
    lifts = [best_lift(softmax, balanced, multiple * n) for multiple in MULTIPLES]
    table = report(softmax, lifts, h, targets if causal else None)
    kl, agreement, loss = compare(softmax, lifts[0], h, targets)
    facts = {"converted from": options.model, "data": val.meta.source if val.meta else options.data}
    facts |= {f"KL from it, {len(h):,} positions of validation": f"{kl:.5f} nats"}
    facts |= {"top-1 agreement": f"{agreement:.2%}"}
    facts |= {"loss there": f"{loss:.4f} nats per token"} if causal else {}
    lifted = lifted_model(model, lifts[0])
    weights = dict(lifted.named_parameters())
    with whole_folder(Path(options.out)) as folder:
        lifted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        card = model_card(lifted.config, weights, name=Path(options.out).name, facts=facts, made="made by hgpt.convert")
        (folder / "README.md").write_text(card, encoding="utf-8")
    return f"{table}\n\n{options.out} has the model with n = {n:.4g}"


def report(softmax: Softmax, lifts: Sequence[Lift], h: Tensor, targets: Tensor | None) -> str:
    """A line for each exponent: KL to the softmax model, agreement with it, and the loss with `targets`."""
    lines = [f"{'n':>8}  {'n/√D':>6}  {'KL, nats':>9}  {'top-1 agreement':>15}  {'loss':>7}"]
    layers: list[Softmax | Lift] = [softmax, *lifts]
    for layer in layers:
        kl, agreement, loss = compare(softmax, layer, h, targets)
        shown = f"{'softmax':>8}  {'':6}"
        if isinstance(layer, Lift):
            shown = f"{layer.n:8.4g}  {layer.n / softmax.w.shape[1] ** 0.5:6.3g}"
        lines.append(f"{shown}  {kl:9.5f}  {agreement:15.2%}" + (f"  {loss:7.4f}" if targets is not None else ""))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
