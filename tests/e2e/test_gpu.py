"""What only a GPU can show. `pytest -m gpu`"""

import pytest
import torch
from tiny_model import make_tiny_model
from training_runs import STAGES, history, options, tiny

from minigpt3d.grouping_minigpt3d import _farthest_point_sampling_loop, farthest_point_sampling, nearest_neighbors
from minigpt3d.training.loop import train


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("num_points", [100, 8192, 20000])
def test_the_sampling_kernel_equals_the_loop(num_points):
    coord = torch.rand(3, num_points, 3, generator=torch.Generator().manual_seed(0))
    start = torch.tensor([0, 7, 99])
    expected = _farthest_point_sampling_loop(coord.permute(2, 0, 1), 64, start)
    assert torch.equal(farthest_point_sampling(coord.cuda(), 64, start.cuda()).cpu(), expected)


def test_nan_and_other_devices_are_sampled_as_on_the_cpu():
    coord = torch.rand(2, 300, 3, generator=torch.Generator().manual_seed(0))
    coord[0, 17, 1] = torch.nan
    expected = farthest_point_sampling(coord, 16)
    for index in range(torch.cuda.device_count()):  # the current one, and the others
        assert torch.equal(farthest_point_sampling(coord.to(f"cuda:{index}"), 16).cpu(), expected)


def test_neighbors_of_many_clouds_equal_those_on_the_cpu():
    coord = torch.rand(512, 1024, 3, generator=torch.Generator().manual_seed(0))
    center = coord[:, :64]
    # Of points that are equally far within rounding, others may be chosen.
    distances = [
        (coord[torch.arange(512)[:, None, None], chosen] - center[:, :, None]).norm(dim=-1).sort(-1).values
        for chosen in (nearest_neighbors(coord.cuda(), center.cuda(), 32).cpu(), nearest_neighbors(coord, center, 32))
    ]
    torch.testing.assert_close(*distances, rtol=1e-5, atol=1e-7)


def test_features_on_gpu_equal_those_on_cpu(point_clouds):
    model = make_tiny_model()
    expected = model.get_point_features(point_clouds).pooler_output
    torch.testing.assert_close(
        model.cuda().get_point_features(point_clouds.cuda()).pooler_output.cpu(), expected, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_training_in_half_precision(dtype, load_in_4bit, base, release, tmp_path, launched):
    """fp16 takes Accelerate's loss scaler; checkpoints hold its state."""
    stage = tiny(STAGES["II"], peak_lr=1e-3, steps_per_epoch=6)
    launched(use_cpu="true")
    losses = [entry["loss"] for entry in history(train(stage, options(base, tmp_path / "cpu", release)))]
    launched(mixed_precision=dtype, use_cpu="false")
    settings = options(base, tmp_path / "gpu", release, load_in_4bit=load_in_4bit, save_every=2)
    folder = train(stage, settings)
    assert [entry["loss"] for entry in history(folder)] == pytest.approx(losses, rel=0.05)
