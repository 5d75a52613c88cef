"""Grouping a point cloud: farthest point sampling, then the nearest neighbors of each center. Paper: §3.1.1.

Both are exact. On a CPU the sampling runs coordinate by coordinate and the neighbors come from a k-d tree (scipy, if
installed); on a GPU the sampling is one Triton kernel and the neighbors come from squared distances, a part of the clouds
at a time. Both are operators that `torch.compile` calls; an exported model has operations of torch in their place.

Shapes: B clouds, N points, G groups, K neighbors.
"""

import re

import numpy as np
import torch


try:
    from scipy.spatial import cKDTree
except ImportError:  # slower, same neighbors
    cKDTree = None

try:
    import triton
    import triton.language as tl
except ImportError:  # no GPU build of torch
    triton = None

# Distances that are held at once, with as many differences in each of three coordinates: what fits into a CPU's cache, and
# 256 MB of a GPU's memory.
MAX_DISTANCES = {"cpu": 1 << 18, "cuda": 1 << 26}

# torch 2.6 does not tell exporting from compiling; what is traced for both is right, and slower.
is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)


def farthest_point_sampling(
    coord: torch.Tensor, num_samples: int, start: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Choose points one by one, each the farthest from all chosen so far.

    The authors start at a random point in every forward pass, even in evaluation; here the start is the first point
    by default, so that the same cloud always gives the same groups. Of equally far points the first is chosen.

    Args:
        coord: (B, N, 3) float coordinates.
        num_samples: G, how many to choose; at most N.
        start: (B,) index of each cloud's first choice, or one index for all; 0 by default.

    Returns:
        (B, G) int64 indices into N.

    Raises:
        ValueError: fewer points than samples, or a start outside the cloud.
    """
    batch_size, num_points, _ = coord.shape
    if num_samples > num_points:
        raise ValueError(
            f"a cloud of {num_points} points cannot give {num_samples} distinct centers. Pass more points "
            "(the processor repeats a small cloud up to its num_points) or lower point_config.num_groups."
        )
    if start is not None:
        start = torch.as_tensor(start, device=coord.device).expand(batch_size).long()
    planes = coord.detach().float().permute(2, 0, 1).contiguous()  # (3, B, N)
    sample = _farthest_point_sampling_traced if is_exporting() else _farthest_point_sampling
    return sample(planes, num_samples, start)


# Operators of their own, so that compiled code calls them as they are. The package and a copy of this file from the Hub
# may be loaded together: each has its own names.
_OPERATORS = re.sub(r"\W", "_", __name__)  # the folder of a copy may be named "my model"


@torch.library.custom_op(f"{_OPERATORS}::farthest_point_sampling", mutates_args=())
def _farthest_point_sampling(planes: torch.Tensor, num_samples: int, start: torch.Tensor | None) -> torch.Tensor:
    """Planes (3, B, N), start (B,) or None for 0 → (B, G)."""
    if start is None:
        start = planes.new_zeros(planes.shape[1], dtype=torch.int64)  # on the device, and nothing waits for a check
    elif ((start < 0) | (start >= planes.shape[2])).any():
        raise ValueError(f"fps_start must be between 0 and {planes.shape[2] - 1}, got {start.tolist()}.")
    if triton is not None and planes.is_cuda:
        return _farthest_point_sampling_triton(planes, num_samples, start)
    return _farthest_point_sampling_loop(planes, num_samples, start)


@_farthest_point_sampling.register_fake
def _(planes: torch.Tensor, num_samples: int, start: torch.Tensor | None) -> torch.Tensor:
    return planes.new_empty(planes.shape[1], num_samples, dtype=torch.int64)


def _farthest_point_sampling_traced(
    planes: torch.Tensor, num_samples: int, start: torch.Tensor | None
) -> torch.Tensor:
    """In operations of torch alone, for `torch.export` and ONNX; every step is in the graph."""
    if start is None:
        start = planes.new_zeros(planes.shape[1], dtype=torch.int64)
    distance, farthest, indices = torch.full_like(planes[0], torch.inf), start, []
    for _ in range(num_samples):
        indices.append(farthest)
        x, y, z = planes - planes.gather(2, farthest[None, :, None].expand(3, -1, 1))  # (B, N) each
        distance = torch.minimum(distance, x * x + y * y + z * z)
        farthest = distance.argmax(-1)
    return torch.stack(indices, dim=1)


def _farthest_point_sampling_loop(planes: torch.Tensor, num_samples: int, start: torch.Tensor) -> torch.Tensor:
    """Coordinate by coordinate in NumPy, whose calls cost a fraction of torch's on arrays that fit into the cache."""
    indices = np.empty((planes.shape[1], num_samples), dtype=np.int64)
    for row, (x, y, z) in enumerate(planes.transpose(0, 1).cpu().numpy()):
        distance = np.full_like(x, np.inf)
        difference, squared = np.empty_like(x), np.empty_like(x)
        farthest = int(start[row])
        for step in range(num_samples):
            indices[row, step] = farthest
            np.subtract(x, x[farthest], out=squared)
            np.multiply(squared, squared, out=squared)
            for plane in (y, z):
                np.subtract(plane, plane[farthest], out=difference)
                np.multiply(difference, difference, out=difference)
                np.add(squared, difference, out=squared)
            np.minimum(distance, squared, out=distance)
            farthest = distance.argmax()
    return torch.from_numpy(indices).to(planes.device)


if triton is not None:

    @triton.jit
    def _farthest_point_sampling_kernel(
        planes, distance, indices, start, num_points, num_samples, BLOCK: tl.constexpr
    ):
        """One program per cloud; the complete loop runs on the device."""
        row = tl.program_id(0)
        stride = tl.num_programs(0) * num_points
        x = planes + row * num_points
        y, z = x + stride, x + 2 * stride
        distance += row * num_points
        farthest = tl.load(start + row)
        for step in range(num_samples):
            tl.store(indices + row * num_samples + step, farthest)
            cx, cy, cz = tl.load(x + farthest), tl.load(y + farthest), tl.load(z + farthest)
            best = -1
            for first in range(0, num_points, BLOCK):
                offset = first + tl.arange(0, BLOCK)
                inside = offset < num_points
                dx = tl.load(x + offset, inside, 0.0) - cx
                dy = tl.load(y + offset, inside, 0.0) - cy
                dz = tl.load(z + offset, inside, 0.0) - cz
                earlier = tl.load(distance + offset, inside, 0.0)
                latest = dx * dx + dy * dy + dz * dz
                nearest = tl.where((latest < earlier) | (latest != latest), latest, earlier)  # NaN stays, as in NumPy
                tl.store(distance + offset, nearest, inside)
                # Bits of floats that are not negative are ordered as they are; NaN is the farthest, as in NumPy.
                order = tl.where(nearest == nearest, nearest.to(tl.int32, bitcast=True), 0x7FFFFFFF)
                order = tl.where(inside, order, -1)
                block_best = tl.max(order, 0)
                block_farthest = tl.min(tl.where(order == block_best, offset, num_points), 0)
                farthest = tl.where(block_best > best, block_farthest.to(tl.int64), farthest)
                best = tl.maximum(best, block_best)


def _farthest_point_sampling_triton(planes: torch.Tensor, num_samples: int, start: torch.Tensor) -> torch.Tensor:
    _, batch_size, num_points = planes.shape
    indices = torch.empty(batch_size, num_samples, dtype=torch.int64, device=planes.device)
    distance = torch.full_like(planes[0], torch.inf)
    block = min(triton.next_power_of_2(num_points), 8192)
    with torch.cuda.device(planes.device):  # Triton launches on the current one
        _farthest_point_sampling_kernel[(batch_size,)](
            planes,
            distance,
            indices,
            start.contiguous(),
            num_points,
            num_samples,
            BLOCK=block,
            num_warps=16,
            enable_fp_fusion=False,  # rounded as on a CPU, so that the same points are chosen
        )
    return indices


def nearest_neighbors(coord: torch.Tensor, center: torch.Tensor, num_neighbors: int) -> torch.Tensor:
    """The points nearest to each center, the center itself among them, in no particular order.

    Args:
        coord: (B, N, 3) float coordinates.
        center: (B, G, 3) float coordinates.
        num_neighbors: K; at most N.

    Returns:
        (B, G, K) int64 indices into N.

    Raises:
        ValueError: fewer points than neighbors.
    """
    if num_neighbors > coord.shape[1]:
        raise ValueError(
            f"a cloud of {coord.shape[1]} points has no {num_neighbors} neighbors. Pass more points (the processor "
            "repeats a small cloud up to its num_points) or lower point_config.group_size."
        )
    coord, center = coord.detach().float(), center.detach().float()
    neighbors = _nearest_neighbors_traced if is_exporting() else _nearest_neighbors
    return neighbors(coord, center, num_neighbors)


@torch.library.custom_op(f"{_OPERATORS}::nearest_neighbors", mutates_args=())
def _nearest_neighbors(coord: torch.Tensor, center: torch.Tensor, num_neighbors: int) -> torch.Tensor:
    """As `nearest_neighbors`, by a k-d tree on a CPU."""
    if cKDTree is None or coord.device.type != "cpu":
        return _nearest_neighbors_in_parts(coord, center, num_neighbors)
    return torch.stack([_nearest_by_tree(p, c, num_neighbors) for p, c in zip(coord, center, strict=True)])


def _nearest_by_tree(coord: torch.Tensor, center: torch.Tensor, num_neighbors: int) -> torch.Tensor:
    """Of one cloud: (N, 3), (G, 3) → (G, K)."""
    if not coord.isfinite().all():  # a tree takes no NaN
        return _nearest_neighbors_in_parts(coord[None], center[None], num_neighbors)[0]
    indices = cKDTree(coord.numpy()).query(center.numpy(), k=num_neighbors)[1]
    return torch.from_numpy(indices.reshape(len(center), num_neighbors))


def _nearest_neighbors_in_parts(
    coord: torch.Tensor, center: torch.Tensor, num_neighbors: int, max_distances: int | None = None
) -> torch.Tensor:
    """By squared distances, of at most `max_distances` pairs at once (or those of one center)."""
    batch_size, num_points, _ = coord.shape
    max_distances = max_distances or MAX_DISTANCES.get(coord.device.type, MAX_DISTANCES["cuda"])
    rows = max(1, min(center.shape[1], max_distances // num_points))  # centers of a cloud in one part
    clouds = max(1, max_distances // (num_points * rows))
    indices = coord.new_empty(batch_size, center.shape[1], num_neighbors, dtype=torch.int64)
    for cloud in range(0, batch_size, clouds):
        points = coord[cloud : cloud + clouds, None].unbind(-1)  # each (B, 1, N)
        for row in range(0, center.shape[1], rows):
            part = center[cloud : cloud + clouds, row : row + rows, None].unbind(-1)  # each (B, G, 1)
            x, y, z = (a - b for a, b in zip(part, points, strict=True))  # (B, G, N)
            distance = x.square_().addcmul_(y, y).addcmul_(z, z)
            indices[cloud : cloud + clouds, row : row + rows] = distance.topk(
                num_neighbors, largest=False, sorted=False
            ).indices
    return indices


@_nearest_neighbors.register_fake
def _(coord: torch.Tensor, center: torch.Tensor, num_neighbors: int) -> torch.Tensor:
    return coord.new_empty(*center.shape[:2], num_neighbors, dtype=torch.int64)


def _nearest_neighbors_traced(coord: torch.Tensor, center: torch.Tensor, num_neighbors: int) -> torch.Tensor:
    """In operations that ONNX has."""
    distance = (center[:, :, None] - coord[:, None]).square().sum(-1)  # (B, G, N)
    return distance.topk(num_neighbors, largest=False).indices


def find_groups(
    coord: torch.Tensor, num_groups: int, group_size: int, fps_start: torch.Tensor | int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find overlapping neighborhoods around centers spread evenly over each cloud.

    Args:
        coord: (B, N, 3) float coordinates.
        num_groups: G.
        group_size: K.
        fps_start: see `farthest_point_sampling`.

    Returns:
        centers (B, G) and neighbors (B, G, K), the center among them, int64 indices into N.
    """
    centers = farthest_point_sampling(coord, num_groups, fps_start)
    return centers, nearest_neighbors(coord, _gather(coord, centers), group_size)


def gather_groups(
    point_clouds: torch.Tensor, centers: torch.Tensor, neighbors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather the points of each group.

    Args:
        point_clouds: (B, N, C) with xyz in the first three channels.
        centers, neighbors: of `find_groups`.

    Returns:
        neighborhood (B, G, K, C), xyz relative to the center and the other channels as they are; center (B, G, 3).
    """
    center = _gather(point_clouds[..., :3], centers)  # (B, G, 3)
    neighborhood = _gather(point_clouds, neighbors.flatten(1))  # (B, G*K, C)
    neighborhood = neighborhood.unflatten(1, neighbors.shape[1:])  # (B, G, K, C)
    neighborhood[..., :3] -= center[:, :, None]
    return neighborhood, center


def _gather(points: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(B, N, C), (B, M) → (B, M, C)."""
    return points.gather(1, indices[..., None].expand(-1, -1, points.shape[-1]))


def group(
    point_clouds: torch.Tensor, num_groups: int, group_size: int, fps_start: torch.Tensor | int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split each cloud (B, N, C) into groups. Arguments as of `find_groups`, results as of `gather_groups`."""
    return gather_groups(point_clouds, *find_groups(point_clouds[..., :3], num_groups, group_size, fps_start))
