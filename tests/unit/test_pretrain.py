"""The household recipe trains the mini-PointNet with BatchNorms and folds them at the end."""

import numpy as np
import torch
from tiny_model import make_tiny_model

from minigpt3d.point_bert_minigpt3d import MiniPointNet
from minigpt3d.recipes.household.pretrain import NormedMiniPointNet, Object, make_views, train_encoder


def apply_layer_by_layer(normed: NormedMiniPointNet, neighborhood: torch.Tensor) -> torch.Tensor:
    """As published: BatchNorms with their running statistics, the group's maximum beside each point."""
    batch, groups, neighbors, _ = neighborhood.shape
    points = normed.linear_1(neighborhood.flatten(0, 2))
    points = normed.linear_2(normed.norm_1.eval()(points).relu()).unflatten(0, (-1, neighbors))
    points = torch.cat([points.amax(1, keepdim=True).expand_as(points), points], dim=-1).flatten(0, 1)
    points = normed.linear_4(normed.norm_2.eval()(normed.linear_3(points)).relu())
    return points.unflatten(0, (batch, groups, neighbors)).amax(2)


def test_batch_norms_are_trained_and_folded():
    config = make_tiny_model().config.point_config
    torch.manual_seed(0)
    normed, neighborhood = NormedMiniPointNet(config), torch.randn(2, 5, 8, 6)
    normed.calibrate(neighborhood)
    for parameter in normed.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = apply_layer_by_layer(normed, neighborhood)
    torch.testing.assert_close(normed(neighborhood), expected, rtol=1e-4, atol=1e-5)
    folded = MiniPointNet(config)
    folded.load_state_dict(normed.fold())
    torch.testing.assert_close(folded(neighborhood), expected, rtol=1e-4, atol=1e-5)
    before = {name: buffer.clone() for name, buffer in normed.named_buffers()}
    normed.train()(neighborhood).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in normed.parameters())
    assert all(torch.equal(buffer, before[name]) for name, buffer in normed.named_buffers())


def test_the_trained_encoder_has_linear_layers_alone():
    model = make_tiny_model().model
    rng = np.random.default_rng(0)
    clouds = rng.uniform(-0.5, 0.5, (4, 300, 6)).astype(np.float32)
    clouds[..., 3:] += 0.5
    kinds = ["chair", "table", "lamp", "chair"]
    objects = [
        Object(f"{kind} {i}", kind, "Things", i == 3, cloud)
        for i, (kind, cloud) in enumerate(zip(kinds, clouds, strict=True))
    ]
    views = make_views(model.config.point_config, objects, num_procedural=2, seed=0)
    train_encoder(model, objects, views, steps=2, batch_size=2)
    encoder = model.point_encoder
    assert type(encoder.mini_pointnet) is MiniPointNet
    assert not any(isinstance(module, torch.nn.BatchNorm1d) for module in encoder.modules())
    assert encoder(torch.from_numpy(clouds)).last_hidden_state.isfinite().all()
