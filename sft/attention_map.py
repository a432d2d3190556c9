"""Where an answer's tokens look (paper Fig. 10): the largest attention weight over all layers and heads on every earlier token, in bins of
neighbouring tokens, as a picture of two or more models side by side.
"""

from pathlib import Path

import torch
from torch import Tensor

from posttrain.models import Roles

NAME = "watched"
COLUMNS, ROWS = 64, 12  # bins of a picture, at most


def activations(roles: Roles, role: str, ids: list[int], start: int) -> Tensor:
    """(R, T) float32 on the CPU: for each of the R tokens from position `start` on, the largest attention weight over layers and heads on each of the
    T tokens; 0 on later ones. Only these rows of the weights are made, layer by layer."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    net, body = roles.use(role).net, roles[role].body
    seen = torch.zeros(len(ids) - start, len(ids), device=roles.device)
    later = torch.ones(len(ids), len(ids), dtype=torch.bool, device=roles.device).triu_(1)[start:]

    def watched(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **more):
        hidden = later if attention_mask is None else ~attention_mask[0, 0, start:]  # a mask says more than "causal" where a layer's window is short
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query[:, :, start:].float() @ keys.float().transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
        torch.maximum(seen, scores.masked_fill_(hidden, float("-inf")).softmax(-1).amax((0, 1)), out=seen)
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)

    AttentionInterface.register(NAME, watched)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = net.config._attn_implementation
    try:
        net.set_attn_implementation(NAME)
        with torch.inference_mode():
            body(input_ids=torch.tensor([ids], device=roles.device), use_cache=False)
    finally:
        net.set_attn_implementation(before)
    return seen.cpu()


def binned(weights: Tensor, most: int, axis: int) -> tuple[Tensor, list[int]]:
    """Neighbours along an axis joined by their maximum into at most `most` bins of equal width, and where each bin begins."""
    width = -(-weights.shape[axis] // most)
    parts = weights.split(width, dim=axis)
    return torch.stack([p.amax(axis) for p in parts], axis), [i * width for i in range(len(parts))]


def draw(path: Path, maps: dict[str, dict]) -> None:
    """A PNG with one panel a model. maps: name -> {"weights": (R, T) Tensor, "start": T's first answer token, "instruction": (first, end) token}.

    Darker is more attention, on one scale for all; what stands before the instruction, where heads rest that have nothing to say, is left white.
    """
    import matplotlib
    from matplotlib.figure import Figure

    panels = {}
    for name, m in maps.items():
        context = m["weights"][:, :m["start"]].clone()
        context[:, :m["instruction"][0]] = 0
        columns, begins = binned(context, COLUMNS, 1)
        panels[name] = (binned(columns, ROWS, 0)[0], begins, m)
    with matplotlib.rc_context({"font.family": "sans-serif", "font.size": 8.0, "text.parse_math": False}):
        fig = Figure(figsize=(7.2, 0.7 + 1.5 * len(panels)), layout="constrained")
        axes = fig.subplots(len(panels), 1, squeeze=False)[:, 0]
        top = max(float(p.max()) for p, _, _ in panels.values()) or 1.0
        for ax, (name, (cells, begins, m)) in zip(axes, panels.items(), strict=True):
            image = ax.imshow(cells.numpy(), cmap="Greys", vmin=0, vmax=top, aspect="auto", interpolation="nearest")
            for at in m["instruction"]:
                ax.axvline(at / (begins[1] if len(begins) > 1 else 1) - 0.5, color="black", linewidth=0.9, linestyle=(0, (3, 2)))
            ax.set_title(f"{name} (the instruction stands between the dashed lines)", loc="left", fontsize=8)
            shown = range(0, len(begins), max(1, len(begins) // 8))
            ax.set_xticks(list(shown), [f"{begins[i]}" for i in shown])
            ax.set_yticks([])
            ax.set_ylabel("last answer")
        axes[-1].set_xlabel("token of the dialogue")
        fig.colorbar(image, ax=list(axes), label="largest weight", shrink=0.8)
        fig.savefig(path, dpi=150, metadata={"Software": None})
