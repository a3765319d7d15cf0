"""Softmax attention within a disk: a token of a grid sees the tokens nearer than r.

With tokens of a grid in raster order, rows y and columns x (CLEAR, arXiv 2412.16112):

    query q sees key k  iff  (y_q - y_k)^2 + (x_q - x_k)^2 < r^2    (strictly)

The softmax is over the kept keys alone; nothing is rescaled. Shared keys (text, say) can stand
beside the grid; every query sees them. Three forms of one function:

- `tiled_attention` goes over tiles of queries. A tile takes the keys of its own place and of r - 1
  tokens around it, hides by a mask those outside of each query's disk, and is a batch entry of
  `scaled_dot_product_attention`. One row of tiles is computed after the other, and no map of all
  queries with all keys ever exists. Runs on every device.
- `flex_local_attention` is one call of FlexAttention with a block mask; compiled, for CUDA.
- `local_attention_reference` masks the whole map. Quadratic; the oracle of the tests.

`local_attention` chooses among the first two.
"""

from collections.abc import Callable
from functools import cache, lru_cache, partial
from math import ceil
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Side of a tile: r within these bounds. A tile of r x r queries takes 9 r^2 keys, of which its
# queries need pi r^2 each. Smaller tiles would compute less on hidden keys, but copy more keys per
# query; larger ones the reverse. From 16 x 16 queries on the copies cost nothing beside the
# products, and below 8 x 8 they cost more.
SMALLEST_TILE, LARGEST_TILE = 8, 16
# Shapes that one process may compile FlexAttention for.
SHAPES = 256
# Tiles of a row that are computed together: their keys should stay in the processor's cache.
TILES_AT_ONCE = 8


class Disk(NamedTuple):
    """Who sees whom.

    Attributes:
        width: of the grid, in tokens; queries and keys are whole rows of it.
        r: radius, in tokens; the border is outside.
        above: rows of keys before the row of the first query.
    """

    width: int
    r: int
    above: int = 0

    def near(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether queries see keys: of positions in their sequences, by broadcasting."""
        dy = query // self.width + self.above - key // self.width
        dx = query % self.width - key % self.width
        return dy * dy + dx * dx < self.r**2

    def holds_all(self, queries: int, keys: int) -> bool:
        """Whether every one of so many queries sees every one of so many keys."""
        last_query, last_key = queries // self.width - 1, keys // self.width - 1
        dy = max(last_query + self.above, last_key - self.above)
        return dy**2 + (self.width - 1) ** 2 < self.r**2


Shared = tuple[Tensor, Tensor]  # keys and values, each (batch, heads, shared keys, channels)


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    disk: Disk,
    shared: Shared | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of the queries to the keys in their disks and to the shared keys.

    Args:
        query: (batch, heads, query rows x width, channels).
        key: (batch, heads, key rows x width, channels).
        value: shaped like `key`.
        disk: the grid's width, the radius, and where the queries' rows lie among the keys'.
        shared: keys and values that all queries see.
        scale: of the products; by default 1 / sqrt(channels).

    Returns:
        Shaped like `query`.
    """
    if disk.holds_all(query.shape[-2], key.shape[-2]):
        key, value = with_shared(key, value, shared)
        return F.scaled_dot_product_attention(query, key, value, scale=scale)
    if query.device.type == "cuda":
        return flex_local_attention(query, key, value, disk, shared, scale)
    return tiled_attention(query, key, value, disk, shared, scale)


def with_shared(key: Tensor, value: Tensor, shared: Shared | None) -> Shared:
    """Keys and values with the shared ones behind them."""
    if shared is None:
        return key, value
    return torch.cat([key, shared[0]], dim=-2), torch.cat([value, shared[1]], dim=-2)


def local_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    disk: Disk,
    shared: Shared | None = None,
    scale: float | None = None,
) -> Tensor:
    """`local_attention` through the mask of all queries and keys. Quadratic; for tests."""
    queries, keys = (torch.arange(x.shape[-2], device=x.device) for x in (query, key))
    near = disk.near(queries[:, None], keys)
    if shared is not None:
        near = F.pad(near, (0, shared[0].shape[-2]), value=True)
    key, value = with_shared(key, value, shared)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~near, float("-inf")).softmax(dim=-1) @ value


# Tiles --------------------------------------------------------------------------------------------


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    disk: Disk,
    shared: Shared | None = None,
    scale: float | None = None,
) -> Tensor:
    """`local_attention`, one row of tiles after the other.

    Memory grows linearly with tokens. While a row is computed it holds the keys of its tiles, and a
    copy of the shared keys for each of them; where gradients are wanted, those of all rows stay.
    """
    batch = query.shape[0]
    # Batch and heads as one dimension, since the mask is the same for them: (batch x heads, rows,
    # width, channels).
    q, k, v = (x.flatten(0, 1).unflatten(1, (-1, disk.width)) for x in (query, key, value))
    common = () if shared is None else tuple(x.flatten(0, 1) for x in shared)
    more = common[0].shape[1] if common else 0
    columns, window = _columns(disk, query.device)
    height, tile = q.shape[1], _side(q.shape[1], disk.r)
    rows, masks = [], {}
    for top in range(0, height, tile):
        bottom = min(top + tile, height)
        # The rows of keys that these queries reach.
        first = max(top + disk.above - disk.r + 1, 0)
        last = min(bottom + disk.above + disk.r - 1, k.shape[1])
        # Rows of tiles far from the border are all alike.
        place = bottom - top, top + disk.above - first, last - first
        if place not in masks:
            here = Disk(disk.width, disk.r, above=place[1])
            masks[place] = _mask(here, place[0], place[2], columns, window, more, q.dtype)
        parts = []
        for start in range(0, len(columns), TILES_AT_ONCE):
            tiles = slice(start, start + TILES_AT_ONCE)
            keys, values = (_gathered(x[:, first:last], window[tiles]) for x in (k, v))
            if common:
                keys, values = (
                    torch.cat([x, s.expand(len(x), -1, -1, -1)], dim=2)
                    for x, s in zip((keys, values), common, strict=True)
                )
            queries = _gathered(q[:, top:bottom], columns[tiles])
            y = F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=masks[place][tiles], scale=scale
            )
            parts.append(y.unflatten(2, (bottom - top, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3))
        rows.append(torch.cat(parts, dim=2)[:, :, : disk.width])
    return torch.cat(rows, dim=1).flatten(1, 2).unflatten(0, (batch, -1))


def _side(length: int, r: int) -> int:
    """Side of a tile along one side of the grid: about r, so that all tiles are alike."""
    largest = min(max(r, SMALLEST_TILE), LARGEST_TILE)
    return ceil(length / ceil(length / largest))


def _columns(disk: Disk, device: torch.device) -> tuple[Tensor, Tensor]:
    """Columns of the queries (tiles, side) and of the keys (tiles, window) of a row of tiles.

    At the right border columns of queries come twice where the last tile isn't full; windows of
    keys are shifted inwards at both borders, so that all keys exist.
    """
    side = _side(disk.width, disk.r)
    # Short integers: the masks made of them are large.
    count = partial(torch.arange, dtype=torch.int32, device=device)
    starts = count(0, disk.width, side)[:, None]
    queries = (starts + count(side)).clamp(max=disk.width - 1)
    window = min(side + 2 * (disk.r - 1), disk.width)
    first = (starts - (disk.r - 1)).clamp(0, disk.width - window)
    return queries, first + count(window)


def _gathered(x: Tensor, columns: Tensor) -> Tensor:
    """(n, rows, width, channels) as (tiles, n, rows x columns of a tile, channels)."""
    x = x.index_select(2, columns.flatten()).unflatten(2, columns.shape)
    return x.permute(2, 0, 1, 3, 4).flatten(2, 3)


def _mask(
    disk: Disk,
    query_rows: int,
    key_rows: int,
    columns: Tensor,
    window: Tensor,
    shared: int,
    dtype: torch.dtype,
) -> Tensor:
    """What is added to the products of a row of tiles, (tiles, 1, queries, keys): 0, or -inf."""

    def positions(rows: int, of_tile: Tensor) -> Tensor:
        starts = torch.arange(rows, dtype=of_tile.dtype, device=of_tile.device) * disk.width
        return (starts[:, None] + of_tile[:, None]).flatten(1)

    queries, keys = positions(query_rows, columns), positions(key_rows, window)
    # Numbers, since every call of the attention would turn truth values into numbers anew.
    mask = torch.zeros(*queries.shape, keys.shape[1] + shared, dtype=dtype, device=columns.device)
    far = ~disk.near(queries[:, :, None], keys[:, None])
    mask[:, :, : keys.shape[1]].masked_fill_(far, float("-inf"))
    return mask[:, None]


# FlexAttention ------------------------------------------------------------------------------------


def flex_local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    disk: Disk,
    shared: Shared | None = None,
    scale: float | None = None,
) -> Tensor:
    """`local_attention` by FlexAttention; compiled on CUDA, uncompiled elsewhere (for tests)."""
    more = 0 if shared is None else shared[0].shape[-2]
    mask = _block_mask(disk, query.shape[-2], key.shape[-2], more, query.device)
    key, value = with_shared(key, value, shared)
    # Under autocast norms leave queries and keys in float32, which only other attentions take.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return _flex(query.device.type == "cuda")(query, key, value, block_mask=mask, scale=scale)


@lru_cache(maxsize=8)
def _block_mask(disk: Disk, queries: int, keys: int, shared: int, device: torch.device) -> Any:
    """The block mask of one resolution, for all layers and steps."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return disk.near(query, key) | (key >= keys)

    # Compiled it is built block by block; uncompiled it would pass through the whole map.
    on_cuda = device.type == "cuda"
    return of_many_shapes(create_block_mask)(
        sees, None, None, queries, keys + shared, device=device, _compile=on_cuda
    )


@cache
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    if not compiled:
        return flex_attention
    # In one graph or not at all: what torch falls back to, computes the whole map. Every
    # resolution is compiled by itself.
    return of_many_shapes(torch.compile(flex_attention, dynamic=False, fullgraph=True))


def of_many_shapes(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled function that may be compiled for more shapes than torch's eight.

    Resolutions, levels of a U-Net, batches with guidance and without, each with gradients and
    without, make more of them in one process.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # in a larger graph, which has its own limit
            return compiled(*args, **kwargs)
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            return compiled(*args, **kwargs)

    return call
