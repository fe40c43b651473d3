"""The method by hand: torch and a plain Llama of transformers, in one file to read, or to copy into your own project::

    python -m hat_lib.by_hand --checkpoint default --capacity 0.7    # beside the library, which only `main` imports;
                                                                     # or --train: routers learn for two minutes

T tokens, C channels of a linear layer's input, D hidden size. ``ids [1, T]`` is one document; fp32, on the CPU."""

import json
from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

PROTECTED = 2  # the first tokens of a document run in full and never leave


def sites(model):
    """By (layer, site): the module that reads an input, the linear layers in it, and the norms of their columns."""
    found = {}
    for i, layer in enumerate(model.model.layers):
        attn, mlp = layer.self_attn, layer.mlp
        found |= {(i, "qkv"): (attn, [attn.q_proj, attn.k_proj, attn.v_proj]), (i, "o"): (attn.o_proj, [attn.o_proj])}
        found |= {(i, "gate_up"): (mlp, [mlp.gate_proj, mlp.up_proj]), (i, "down"): (mlp.down_proj, [mlp.down_proj])}
    for place, (reader, linears) in found.items():  # summed in slices, as the library does, so that no bit differs
        slices = [rows.norm(dim=0) for linear in linears for rows in linear.weight.split(1024)]
        found[place] = reader, linears, torch.stack(slices).norm(dim=0)
    return found


def score(x, length, log_scale=0.0, sensitivity=0.0):
    """``|x_i| ||W[:, i]|| exp(a_i) exp(u)`` of ``x [..., C]``: a is the channel's own, u ``[..., 1]`` the token's."""
    return x.abs() * length * torch.as_tensor(log_scale + sensitivity).exp()


def skipping(model, decide):
    """Hook a model so that each site reads ``x * decide(place, length, x)`` in place of x; returns the hooks."""

    def before(place, length, module, args, kwargs):
        x = args[0] if args else kwargs.pop("hidden_states")
        return (x * decide(place, length, x), *args[1:]), kwargs

    found = [(reader, partial(before, place, length)) for place, (reader, _, length) in sites(model).items()]
    return [reader.register_forward_pre_hook(hook, with_kwargs=True) for reader, hook in found]


@torch.no_grad()
def losses(model, blocks, hooks=()):
    """Nats of each token but the first of each block, under hooks that are then removed: perplexity is exp(mean)."""
    nats = [F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none") for ids in blocks]
    for hook in hooks:
        hook.remove()
    return torch.cat(nats)


def quantiles(model, blocks, share):
    """At each site, the threshold that keeps this share of the dense model's scores on a text."""
    seen = {}

    def watch(place, length, x):
        seen.setdefault(place, []).append(score(x, length)[0, PROTECTED:].flatten())
        return 1.0

    losses(model, blocks, skipping(model, watch))
    return {place: float(torch.cat(scores).quantile(1 - share)) for place, scores in seen.items()}


def between(x, xs, ys):
    """The value at x on straight lines through the points (xs, ys), where xs rise."""
    i = sum(known < x for known in xs)
    return ys[i - 1] + (x - xs[i - 1]) / (xs[i] - xs[i - 1]) * (ys[i] - ys[i - 1])


def read(folder, capacity):
    """A checkpoint: its tensors, by part, and what its calibration has for a capacity below 1."""
    parts = {}
    for name, tensor in load_file(f"{folder}/hat_adapter.safetensors").items():
        kind, place, name = name.split(".", 2)
        parts.setdefault(f"{kind}.{place}", {})[name] = tensor
    with open(f"{folder}/hat_config.json") as file:
        table = json.load(file)["calibration"]
    at, names = partial(between, capacity, table["capacities"]), table["sites"]
    return {
        "parts": parts,
        "thresholds": {(i, s): at(row[n]) for i, row in enumerate(table["thresholds"]) for n, s in enumerate(names)},
        "sensitivity": at(table["sensitivity"]) if table["sensitivity"] else 1.0,
        "correction": min(1, (1 - capacity) / 0.55) ** 2,
        "head": (at(table["head_thresholds"]), at(table["head_margins"])),
    }


def consult(h, gate):
    """What leaving scores above staying, ``[...]``, and ``h [..., D]`` as it leaves: ``h + |h| (a n + U V n + b)``."""
    n = F.rms_norm(h, h.shape[-1:])
    stay, leave = (n @ gate["gate.weight"].T + gate["gate.bias"]).unbind(-1)
    change = gate["scale"] * n + n @ gate["reduce.weight"].T @ gate["expand.weight"].T + gate["shift"]
    return leave - stay, h + h.norm(dim=-1, keepdim=True) * change


def leaving(model, parts, exits, left):
    """Hook exits, thresholds by layers run. The state of who left stays; later layers take K and V from it, no more."""
    left["tokens"], layers = torch.tensor(False), list(model.model.layers)

    def after(depth, layer, args, out):
        gone = left["tokens"]
        h = torch.where(gone[..., None], args[0], out)
        if depth in exits:
            beats, translated = consult(h, parts[f"gates.{depth}"])
            leave = (beats > exits[depth]) & ~gone
            leave[:, :PROTECTED] = False
            h, gone = torch.where(leave[..., None], translated, h), gone | leave
        left["tokens"] = gone if depth < len(layers) else torch.tensor(False)
        return h

    return [layer.register_forward_hook(partial(after, depth)) for depth, layer in enumerate(layers, start=1)]


def correcting(linears, part, strength):
    """Hook the linear layers of a site to add ``strength (B A x + c)`` to W x, for the x that is kept."""

    def after(up, shift, module, args, out):
        return out.add(F.linear(F.linear(args[0], part["down"]), up, shift), alpha=strength)

    widths = [linear.out_features for linear in linears]
    terms = zip(linears, part["up"].split(widths), part["shift"].split(widths), strict=True)
    return [linear.register_forward_hook(partial(after, up, shift)) for linear, up, shift in terms]


def shortlist(head, threshold, margin):
    """Hook the LM head: logits from the channels above a threshold; in full where near the best."""

    def after(module, args, logits):
        preview = (args[0] * (score(args[0], module.weight.norm(dim=0)) > threshold)) @ module.weight.T
        return torch.where(preview >= preview.amax(-1, keepdim=True) - margin, logits, preview)

    return [head.register_forward_hook(after)]


def adapt(model, now, exits=()):
    """Hook a checkpoint, as `read` gives it, to a model; ``exits``: thresholds of gates, by depth. Returns hooks."""
    parts, left, u = now["parts"], {}, {}

    def decide(place, length, x):
        i, site = place
        if site == "qkv":  # how sensitive each token is in this layer
            router = parts[f"routers.{i}_token"]
            u[i] = ((x * router["weight"]).sum(-1, keepdim=True) + router["bias"]) * now["sensitivity"]
        unit = length * parts[f"routers.{i}_{site}"]["log_scale"].exp()
        keep = x.abs() > now["thresholds"][place] / unit * (-u[i]).clamp(-3, 3).exp()  # a score above its threshold
        keep[:, :PROTECTED] = True
        return keep | left["tokens"][..., None]  # K and V of those who left come from all channels

    hooks = leaving(model, parts, exits, left) + skipping(model, decide) + shortlist(model.lm_head, *now["head"])
    for (i, site), (_, linears, _) in sites(model).items():
        if part := parts.get(f"corrections.{i}_{site}"):
            hooks += correcting(linears, part, now["correction"])
    return hooks


def straight_through(score, threshold, temperature=0.5):
    """1 where a score is above its threshold, else 0, with the gradient of ``sigmoid(log(score / threshold) / t)``."""
    soft = torch.sigmoid((score / threshold).clamp(min=1e-6).log() / temperature)
    return (score > threshold) + (soft - soft.detach())


def train_routers(model, blocks, thresholds, share, lr=1e-2):
    """Learn a scale for each channel, from the KL from the base and the distance from this share of channels kept."""
    scales = {place: torch.zeros_like(length, requires_grad=True) for place, (*_, length) in sites(model).items()}
    optimizer = torch.optim.Adam(scales.values(), lr)

    def decide(place, length, x):
        kept.append(straight_through(score(x.detach(), length, scales[place]), thresholds[place]))
        return kept[-1]

    for ids in blocks:
        base = model(ids).logits.log_softmax(-1)
        kept, hooks = [], skipping(model, decide)
        adaptive = model(ids).logits.log_softmax(-1)
        for hook in hooks:
            hook.remove()
        loss = (base.exp() * (base - adaptive)).sum(-1).mean() + (torch.cat(kept, -1).mean() - share).abs()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return scales


def main(checkpoint: str = "default", capacity: float = 0.7, text: str = "docstrings", train: bool = False):
    """Perplexity over the base's, by hand and by the library; or by hand, before and after training."""
    from hat_lib import HierarchicalTransformer, load_base, load_text, sweep
    from hat_lib.checkpoint import find_checkpoint
    from hat_lib.config import check_capacity

    now, loaded = read(find_checkpoint(checkpoint), check_capacity(capacity)), load_base("bundled", dtype="fp32")
    rows, model = load_text(text, loaded.tokenizer, max_tokens=4096), loaded.model
    taught = load_text("addresses", loaded.tokenizer, split="train", block_size=128, max_tokens=60 * 128)
    blocks, lessons = ([torch.tensor([ids]) for ids in part["input_ids"]] for part in (rows, taught))
    base = losses(model, blocks).mean()
    if not train:
        by_hand = float((losses(model, blocks, adapt(model, now)).mean() - base).exp() - 1)
        theirs = sweep(HierarchicalTransformer.from_pretrained(checkpoint, loaded), rows, capacity).frame["increase"][0]
        return print(f"by hand {by_hand:+.4%}, by the library {theirs:+.4%}, difference {by_hand - theirs:+.4%}")
    bars, scales, kept = quantiles(model, lessons[:8], capacity), {}, []

    def decide(place, length, x):
        kept.append(score(x, length, scales.get(place, 0.0)) > bars[place])
        return kept[-1]

    for name in "untrained", "trained":
        increase = (losses(model, blocks, skipping(model, decide)).mean() - base).exp() - 1
        share = float(sum(k.sum() for k in kept) / sum(k.numel() for k in kept))
        print(f"{name}: {share:.3f} of the channels kept, perplexity {increase:+.1%} over the base's", flush=True)
        scales = scales or train_routers(model, lessons, bars, share)  # to keep as many
        kept.clear()


if __name__ == "__main__":
    from hat_lib.terminal import run

    run(main)
