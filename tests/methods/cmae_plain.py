"""C-MAE from the paper's formulas, token by token, in any precision; nothing of fastmim but its choices.

Tokens are looked up by (image, position), candidates are listed one by one, and InfoNCE is a log of a sum of
exponentials of cosines. Position -1 is the class token, position None a whole image.
"""

import torch
from torch import Tensor

from tests.methods import plain


def head(x_BLD: Tensor, w: dict[str, Tensor], name: str, norm: str) -> Tensor:
    h = plain.linear(x_BLD, w, f"{name}.0")
    if norm == "ln":
        h = plain.layer_norm(h, w, f"{name}.1")
    if norm == "bn":
        rows = h.flatten(0, 1)
        var = (rows - rows.mean(0)).square().mean(0)
        h = (h - rows.mean(0)) / (var + 1e-6).sqrt() * w[f"{name}.1.weight"] + w[f"{name}.1.bias"]
    h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    return plain.linear(h, w, f"{name}.1" if norm == "none" else f"{name}.3")


def part(w: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in w.items() if name.startswith(prefix)}


def tokens(
    image: Tensor, visible_BN: Tensor, w: dict[str, Tensor], cmae, encoder: str, heads: list[str]
) -> dict:
    """What is compared of one branch, by (image, position)."""
    c, m = cmae.config, cmae.model
    encode = plain.encode_with_mask_tokens if c.mask_token else plain.encode
    z = encode(image, visible_BN, part(w, encoder + "."), m.patch, m.heads)
    rows: list[tuple]
    if c.compare == "cls":
        z, rows = z[:, :1], [(b, None) for b in range(len(z))]
    elif c.compare == "avg":
        z, rows = z[:, 1:].mean(1, keepdim=True), [(b, None) for b in range(len(z))]
    else:
        everywhere = torch.ones_like(visible_BN) if c.mask_token else visible_BN
        rows = []
        for b, line in enumerate(everywhere):
            rows += [(b, -1)] * (c.compare == "patch+cls") + [(b, t) for t in line.nonzero()[:, 0].tolist()]
        z = z if c.compare == "patch+cls" else z[:, 1:]
    for name in heads:
        z = head(z, w, name, c.head_norm)
    return dict(zip(rows, z.flatten(0, 1), strict=True))


def mixed(image: Tensor, foreign_BN: Tensor, p: int) -> Tensor:
    out = image.clone()
    columns = image.shape[2] // p
    for b, t in foreign_BN.nonzero().tolist():
        y, x = t // columns * p, t % columns * p
        out[b, y : y + p, x : x + p] = image[b ^ 1, y : y + p, x : x + p]
    return out


def one_way(cmae, w, online, seen_q: Tensor, target, seen_k: Tensor, foreign_BN: Tensor | None) -> Tensor:
    c, N = cmae.config, cmae.model.num_patches
    visible_q, visible_k = plain.visible_mask(seen_q, N), plain.visible_mask(seen_k, N)
    if foreign_BN is not None:
        online = mixed(online, foreign_BN, cmae.model.patch)
    queries = tokens(online, visible_q, w, cmae, "encoder", ["projector", "predictor"])
    keys = tokens(target, visible_k, w, cmae, "target_encoder", ["target_projector"])
    keys = {at: k.detach() for at, k in keys.items()}
    foreign = set() if foreign_BN is None else {tuple(at) for at in foreign_BN.nonzero().tolist()}
    losses = []
    for (b, t), q in queries.items():
        positive = (b ^ 1, t) if (b, t) in foreign else (b, t)
        if positive not in keys:
            continue
        if t not in (None, -1) and c.positions != "all" and visible_q[b, t] != (c.positions == "visible"):
            continue
        candidates = [keys[at] for at in candidates_of(c, (b, t), foreign, keys)]
        losses.append(token_loss(c, q, keys[positive], candidates))
    return torch.stack(losses).mean()


def candidates_of(c, at: tuple, foreign: set, keys: dict) -> list[tuple]:
    """The sum of Eq. 10 runs over the keys of the clean images, whatever was mixed: each once.

    Among the positions of one image, of a mixed one: the key of the image that each patch is from.
    """
    b, t = at
    if c.negatives == "image":
        positions = sorted({s for _, s in keys}, key=str)
        row = [(b ^ 1 if (b, s) in foreign else b, s) for s in positions]
        return [place for place in row if place in keys]
    return [place for place in keys if c.negatives == "all" or place[1] == t]


def token_loss(c, q: Tensor, positive: Tensor, candidates: list[Tensor]) -> Tensor:
    def cos(k: Tensor) -> Tensor:
        return (q @ k) / (q.norm() * k.norm())

    if c.loss == "byol":
        return 2 - 2 * cos(positive)
    if c.loss == "negative_cosine":
        return -cos(positive)
    sims = torch.stack([cos(k) / c.temperature for k in candidates])
    loss = sims.exp().sum().log() - cos(positive) / c.temperature
    return loss * (2 * c.temperature if c.loss_scale == "2tau" else 1)


def loss_and_gradients(cmae, batch, foreign_BN: Tensor | None, dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss in this precision, and its gradient by every weight that has one."""
    w = {name: x.detach().to(dtype).requires_grad_() for name, x in cmae.state_dict().items()}
    one, two = batch.crops[0], batch.crops[-1]
    seen1, seen2 = cmae.transform(batch.seeds_B)
    loss = one_way(cmae, w, one, seen1, two, seen2, foreign_BN)
    if cmae.config.symmetric:
        loss = (loss + one_way(cmae, w, two, seen2, one, seen1, foreign_BN)) / 2
    loss.backward()
    return loss.detach(), {name: x.grad for name, x in w.items() if x.grad is not None}
