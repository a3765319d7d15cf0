"""Attention within a disk on several devices: each holds some rows of the image (CLEAR, 3.4).

arXiv 2412.16112. The image is cut into horizontal patches. The queries of a patch need the keys of
their own rows and of r - 1 rows of the neighbours above and below, and nothing else of the image:
their results are exact. Text queries see everything; here each device lets them see the text and
its own patch, and the results are averaged. That is an approximation, for which one small sum over
the devices is enough.

`patch_attention` computes all patches in one place; `patch_attention_distributed` computes one per
process. For sampling: no gradient passes between processes. Pooled keys would have to be gathered
from everywhere and aren't supported.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pared.attention.joint import Heads
from pared.errors import InputError
from pared.nn.local_attention import Disk, local_attention


def patch_rows(height: int, patches: int, r: int) -> list[range]:
    """The rows of each patch, as equal as possible.

    Raises:
        InputError: a patch would have fewer rows than r, and reach beyond its neighbours.
    """
    if height // patches < r:
        raise InputError(
            f"{height} rows of tokens in {patches} patches leave fewer than r={r} rows to a patch; "
            f"use at most {max(height // r, 1)} of them."
        )
    borders = [height * patch // patches for patch in range(patches + 1)]
    return [range(*pair) for pair in pairwise(borders)]


def patch_attention(
    image: Heads, text: Heads, height: int, width: int, r: int, patches: int
) -> tuple[Tensor, Tensor]:
    """Mixed image and text tokens, computed patch by patch.

    Args:
        image: heads of the image tokens, in raster order.
        text: heads of the text tokens.
        height: of the image in tokens.
        width: likewise.
        r: radius of the disk.
        patches: number of patches.

    Raises:
        InputError: a patch would have fewer rows than r.
    """
    images, texts = [], []
    for rows in patch_rows(height, patches, r):
        first, last = max(rows.start - r + 1, 0), min(rows.stop + r - 1, height)
        own = slice(rows.start * width, rows.stop * width)
        reach = slice(first * width, last * width)
        patch = Heads(image.query[:, :, own], image.key[:, :, reach], image.value[:, :, reach])
        y_image, y_text = _of_patch(patch, text, Disk(width, r, above=rows.start - first))
        images.append(y_image)
        texts.append(y_text)
    return torch.cat(images, dim=-2), torch.stack(texts).mean(dim=0)


@torch.no_grad()
def patch_attention_distributed(
    image: Heads,
    text: Heads,
    height: int,
    width: int,
    r: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`patch_attention` with one patch per process; all processes of the group must call it.

    Args:
        image: heads of this process's rows: those of `patch_rows(height, processes, r)[rank]`.
        text: heads of the text tokens, the same in every process.
        height: of the whole image in tokens.
        width: likewise.
        r: radius of the disk.
        group: the processes; by default all.

    Returns:
        Mixed image tokens of this process's rows, and mixed text tokens, the same in every process.

    Raises:
        InputError: a patch would have fewer rows than r; in every process.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    rows = patch_rows(height, size, r)[rank]
    if image.key.shape[-2] != len(rows) * width:
        raise InputError(
            f"process {rank} of {size} got {image.key.shape[-2]} image tokens; its patch is rows "
            f"{rows.start} to {rows.stop - 1} of {width} tokens each, {len(rows) * width} in all."
        )
    reach, above = _with_halo(torch.stack([image.key, image.value]), (r - 1) * width, group)
    patch = Heads(image.query, *reach)
    y_image, y_text = _of_patch(patch, text, Disk(width, r, above=above // width))
    dist.all_reduce(y_text, group=group)
    return y_image, y_text / size


def _of_patch(patch: Heads, text: Heads, disk: Disk) -> tuple[Tensor, Tensor]:
    """The queries of a patch, whose keys have the halo around them; the text's see no halo."""
    y_image = local_attention(patch.query, patch.key, patch.value, disk, (text.key, text.value))
    start = disk.above * disk.width
    own = slice(start, start + patch.query.shape[-2])
    y_text = F.scaled_dot_product_attention(
        text.query,
        torch.cat([text.key, patch.key[:, :, own]], dim=-2),
        torch.cat([text.value, patch.value[:, :, own]], dim=-2),
    )
    return y_image, y_text


def _with_halo(x: Tensor, halo: int, group: dist.ProcessGroup | None) -> tuple[Tensor, int]:
    """`x` (..., tokens, channels) between the neighbours' nearest tokens, `halo` of each.

    Returns:
        The longer tensor, and the number of tokens that came before `x`.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts, waiting, sent = [x], [], []

    def exchange(neighbour: int, mine: Tensor) -> Tensor:
        peer = neighbour if group is None else dist.get_global_rank(group, neighbour)
        sent.append(mine.contiguous())  # kept until it has arrived
        theirs = torch.empty_like(sent[-1])
        waiting.append(dist.P2POp(dist.isend, sent[-1], peer, group))
        waiting.append(dist.P2POp(dist.irecv, theirs, peer, group))
        return theirs

    if halo and rank > 0:
        parts.insert(0, exchange(rank - 1, x[..., :halo, :]))
    if halo and rank < size - 1:
        parts.append(exchange(rank + 1, x[..., -halo:, :]))
    if waiting:
        for work in dist.batch_isend_irecv(waiting):
            work.wait()
    return torch.cat(parts, dim=-2), halo if halo and rank > 0 else 0
