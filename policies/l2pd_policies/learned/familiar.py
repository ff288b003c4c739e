"""What blocks looked like in a filter's training, and which blocks look unlike them.

A block is described before anything is committed in it, so its description does not depend on the
policy's own decisions in the block. It is a few numbers: for each compared input of the filter, the
mean and the standard deviation over the block's masked positions, and the means of eight parts of
the block. Single positions of a new kind of text look like those of known kinds; whole blocks do
not (docs/learned_policies.md).
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from l2pd_plugins.errors import L2PDError
from l2pd_plugins.files import one_line, reading, require_file
from l2pd_plugins.tensor_files import header_of
from l2pd_plugins.trajectories import Trajectories
from l2pd_plugins.writing import write_whole

FILE = "familiar.safetensors"
"""Name of the file in a filter's folder."""
PARTS = 8
"""Parts of a block whose means are compared."""
NEIGHBOUR = 3
"""An example's reach is proportional to its distance to its third nearest example."""
MOST_EXAMPLES = 512
"""Examples that are kept of a training."""
OUTSIDE = 0.05
"""Share of the training's own blocks that would look unlike those of all other prompts."""
_LEAST_SCALE = 0.01
_DTYPES = {"centre": "F32", "scale": "F32", "examples": "F16", "reach": "F32"}
"""How the file stores each tensor, by safetensors' names of dtypes."""
_MOST_STORED = 2**16
"""Examples that a file may hold."""


class Familiar(nn.Module):
    """The blocks of a filter's training: M examples, each a description of D numbers.

    A block looks like the training if at least one example is within its reach. The tensors are no
    weights of the filter: they are stored in a file of their own.

    Args:
        centre, scale: (D,) float32, which descriptions are normalised by.
        examples: (M, D) float16, normalised.
        reach: (M,) float32, the greatest distance of a block that looks like the example.
    """

    centre: Tensor
    scale: Tensor
    examples: Tensor
    reach: Tensor

    def __init__(self, centre: Tensor, scale: Tensor, examples: Tensor, reach: Tensor) -> None:
        super().__init__()
        for name, value in (
            ("centre", centre),
            ("scale", scale),
            ("examples", examples),
            ("reach", reach),
        ):
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def of(cls, described: Tensor, prompts: Tensor) -> Familiar:
        """The examples of N blocks: described (N, D) float32, prompts (N,) int64, the prompt of
        each block. Deterministic.

        Distances are compared between blocks of different prompts only, since blocks of one prompt
        are nearly equal. Raises L2PDError if there are fewer than two prompts.
        """
        if len(prompts.unique()) < 2:
            raise L2PDError("blocks of at least two prompts are needed, to compare them")
        centre = described.mean(0)
        scale = described.std(0) + _LEAST_SCALE
        stored = ((described - centre) / scale).to(torch.float16)
        normal = stored.float()
        chosen = _spread(normal, MOST_EXAMPLES)
        own = prompts.unsqueeze(-1) == prompts[chosen]
        distance = torch.cdist(normal, normal[chosen], compute_mode="donot_use_mm_for_euclid_dist")
        distance = distance.masked_fill(own, torch.inf)
        between = distance[chosen].sort(dim=-1).values
        # A training of few prompts may have fewer neighbours.
        known = between.isfinite().sum(-1).clamp(min=1, max=NEIGHBOUR)
        reach = between.gather(-1, known.unsqueeze(-1) - 1).squeeze(-1)
        usual = reach[reach.isfinite()].median() if reach.isfinite().any() else torch.tensor(1.0)
        reach = reach.masked_fill(~reach.isfinite(), 0.0).clamp(min=max(float(usual), 1e-3))
        nearest = (distance / reach).amin(-1)
        nearest = nearest[nearest.isfinite()].sort().values
        stretch = nearest[min(len(nearest) - 1, int((1 - OUTSIDE) * len(nearest)))]
        return cls(centre, scale, stored[chosen], reach * max(float(stretch), 1e-3))

    def unlike(self, described: Tensor) -> Tensor:
        """(B, D) float32 descriptions -> (B,) bool: blocks that no example reaches. A block whose
        description is not finite is unlike every example.
        """
        normal = (described - self.centre) / self.scale
        # Elementwise, and summed over the last dimension: a row's bits do not depend on others.
        squared = (normal.unsqueeze(1) - self.examples.float()).square().sum(-1)
        return ~(squared <= self.reach.square()).any(-1)

    def save(self, folder: Path) -> None:
        """Write the file into a filter's folder."""
        tensors = {name: getattr(self, name).contiguous().cpu() for name in _DTYPES}
        write_whole(folder / FILE, lambda temporary: save_file(tensors, temporary))

    @classmethod
    def load(cls, folder: Path, called: str, size: int) -> Familiar:
        """Read the file of a filter's folder; `size` is the length of a description.

        Raises L2PDError, in which the file is named `called`, if it cannot be read, or its tensors
        do not have the types and shapes above, or values that are not finite.
        """
        path = folder / FILE
        require_file(path, called)
        stored_as = header_of(path, f"{called} cannot be read")
        shapes = {name: tuple(shape) for name, (_, shape) in stored_as.items()}
        types = {name: dtype for name, (dtype, _) in stored_as.items()}
        count = shapes.get("reach", (0,))[0] if shapes.get("reach") else 0
        wanted = {"centre": (size,), "scale": (size,), "examples": (count, size), "reach": (count,)}
        if shapes != wanted or types != _DTYPES or not 1 <= count <= _MOST_STORED:
            raise L2PDError(
                f"{called} holds {one_line(shapes)} of {one_line(types)}; expected {_DTYPES} of "
                f"shapes ({size},), ({size},), (M, {size}), (M,) with M from 1 to {_MOST_STORED}"
            )
        with reading(f"{called} cannot be read"):
            tensors = load_file(path)
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise L2PDError(f"{called}: {name} has values that are not finite")
        for name in ("scale", "reach"):
            if not bool((tensors[name] > 0).all()):
                raise L2PDError(f"{called}: {name} has values that are not above 0")
        return cls(**tensors)


def describe(inputs: Tensor, masked: Tensor) -> Tensor:
    """Inputs (B, L, C) float32 of a filter and masks (B, L) -> (B, D) float32 with D = C * (2 +
    PARTS): the description of each block, of any length L.
    """
    count = masked.sum(-1, keepdim=True).clamp(min=1)
    open_ = masked.to(inputs.dtype)
    channels = inputs.transpose(1, 2).contiguous()
    mean = (channels * open_.unsqueeze(1)).sum(-1) / count
    away = (channels - mean.unsqueeze(-1)) * open_.unsqueeze(1)
    spread = (away.square().sum(-1) / count).sqrt()
    # Masked position number r of n covers r/n to (r+1)/n of the block; a part has its share of it.
    rank = (masked.cumsum(-1) - 1).unsqueeze(1) * PARTS / count.unsqueeze(1)
    parts = torch.arange(PARTS, device=inputs.device).view(1, -1, 1)
    width = PARTS / count.unsqueeze(1)
    share = (torch.minimum(rank + width, parts + 1.0) - torch.maximum(rank, parts.float())).clamp(0)
    share = share * open_.unsqueeze(1)
    of_parts = (channels.unsqueeze(2) * share.unsqueeze(1)).sum(-1)
    return torch.cat([mean, spread, of_parts.flatten(1)], dim=-1)


def first_steps(data: Trajectories) -> Tensor:
    """(N,) int64: for every block of every prompt, its first recorded step before anything was
    committed in it, in the order of the policies.
    """
    at = ((data.step == 0) & data.masked.any(-1)).nonzero().flatten()
    at = at[data.policy[at].argsort(stable=True)]
    key = data.prompt[at] * (int(data.block.max()) + 1) + data.block[at]
    order = key.argsort(stable=True)
    key = key[order]
    new = torch.ones_like(key, dtype=torch.bool)
    new[1:] = key[1:] != key[:-1]
    return at[order[new]]


def _spread(points: Tensor, most: int) -> Tensor:
    """(K,) int64: at most so many of the points (N, D), each as far as possible from the others:
    farthest-point sampling from the first.
    """
    if len(points) <= most:
        return torch.arange(len(points))
    chosen = [0]
    nearest = (points - points[0]).square().sum(-1)
    for _ in range(most - 1):
        at = int(nearest.argmax())
        chosen.append(at)
        nearest = torch.minimum(nearest, (points - points[at]).square().sum(-1))
    return torch.tensor(chosen)
