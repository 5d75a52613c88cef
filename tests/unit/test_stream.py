"""The samples of a step: divided among processes, drawn from the sources, packed into rows."""

import copy
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention
from training_runs import STAGES, open_stream, prepared, tiny
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from minigpt3d.training.stages import Source
from minigpt3d.training.stream import BUCKET, Packing, pack_batch, pad_batch, read_ahead
from minigpt3d.training.weights import compile_layers


def test_processes_divide_the_steps_and_epochs_cover_every_row(release, tiny_processor):
    stage = tiny(STAGES["III"], steps_per_epoch=30)
    whole = open_stream(stage, release, tiny_processor)
    shares = [open_stream(stage, release, tiny_processor, process_index=rank, num_processes=2) for rank in range(2)]
    assert [list(share.slots(0)) for share in shares] == [[0, 2], [1]]
    for rank, share in enumerate(shares):
        assert share.source_name(0) == whole.source_name(0)
        for slot in share.slots(0):
            sample, expected = share.encode(0, slot), whole.encode(0, slot)
            assert all(torch.equal(sample[name], expected[name]) for name in expected), (rank, slot)
    seen = {name: [] for name in whole.sources}
    for step in range(30):
        name = whole.source_name(step)
        for slot in whole.slots(step):
            _, row = whole.orders[name].address(int(whole.turns[step, 0]), slot)
            seen[name].append(row)
    for rows in seen.values():
        assert sorted(rows[:6]) == sorted(rows[6:12]) == list(range(6))
        assert rows[:6] != rows[6:12]


def test_sources_can_be_drawn_for_each_sample(release, tiny_processor):
    stage = tiny(STAGES["III"], steps_per_epoch=400, draw_each="sample")
    stream = open_stream(stage, release, tiny_processor)
    weights = np.array([source.weight for source in stage.mixture])
    assert stream.draws.shape == (400, 3) and stream.source_name(0) == "mixed"
    shares = np.bincount(stream.draws.ravel()) / stream.draws.size
    assert np.abs(shares - weights / weights.sum()).max() < 0.05
    assert (stream.draws != stream.draws[:, :1]).any(), "within a step too"
    for index, source in enumerate(stage.mixture):  # each source yields all its rows before it repeats one
        turns = stream.turns[stream.draws == index]
        assert (turns == np.arange(len(turns))).all()
        rows = [stream.orders[source.name].address(int(turn), 0)[1] for turn in turns[:12]]
        assert sorted(rows[:6]) == sorted(rows[6:]) == list(range(6))
    lengths = {len(stream.encode(step, slot)["labels"]) for step in range(5) for slot in range(3)}
    assert len(lengths) > 1
    with pytest.raises(ValueError, match="same batch"):
        open_stream(replace(STAGES["III"], draw_each="sample"), release, tiny_processor)


@pytest.mark.parametrize("name", ["II", "IV"])
def test_packed_batches_equal_padded_ones(name, release, tiny_processor):
    """Loss and gradients, with several samples in a row, and with all in one."""
    stage = replace(tiny(STAGES[name]), mixture=(Source("multi_round", batch=6, weight=1),))
    stream = open_stream(stage, release, tiny_processor)
    samples = [stream.encode(0, slot) for slot in stream.slots(0)]
    model = prepared(stage).eval()
    results = []
    packing = Packing.of(model)
    assert packing.masked and not packing.one_row
    one_row = replace(packing, one_row=True, masked=True)  # the boundaries are for a kernel that needs a GPU
    for batch in (
        pad_batch(samples, 292),
        pack_batch(samples),
        pack_batch(samples, packing),
        pack_batch(samples, one_row),
    ):
        model.zero_grad()
        output = model(**batch, use_cache=False)
        output.loss.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((output.loss.detach(), gradients, batch["input_ids"].shape, output.logits.shape))
    (loss, gradients, padded, _), *others = results
    assert len(others[-1][1]) == len(gradients) and others[-1][2][0] == 1 and others[0][2][0] < padded[0]
    for packed_loss, packed_gradients, _, answer_logits in others:
        torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-6)
        num_answers = sum((sample["labels"] != -100).sum() for sample in samples)
        assert num_answers <= answer_logits[1] < num_answers + BUCKET, "no logits but the answers'"
        for parameter, gradient in gradients.items():
            scale = gradient.abs().max() + 1e-12
            assert (packed_gradients[parameter] - gradient).abs().max() <= 1e-5 * scale + 1e-8, parameter


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_that_cannot_be_read_is_told_in_one_line(num_workers, release, tiny_processor, tmp_path, monkeypatch):
    folder, (annotations,) = release
    clouds = shutil.copytree(folder, tmp_path / "clouds")
    cloud = np.load(clouds / "o3_8192.npy")
    cloud[5, 0] = np.nan
    np.save(clouds / "o3_8192.npy", cloud)
    stage = tiny(STAGES["I"])
    with pytest.raises(ValueError, match=r"^object_id 'o3': [^\n]*o3_8192.npy holds NaN[^\n]*$"):
        list(read_ahead(open_stream(stage, (clouds, [annotations]), tiny_processor), range(4), num_workers))

    class PanicException(BaseException):
        """As the Rust code of tokenizers raises it."""

    def panic(*args, **kwargs):
        raise PanicException("index out of bounds")

    monkeypatch.setattr(type(tiny_processor.tokenizer), "__call__", panic)
    with pytest.raises(ValueError, match=r"^object_id 'o\d' \([^\n]*.json, record \d+\): [^\n]*index out of bounds"):
        list(read_ahead(open_stream(stage, release, tiny_processor), range(4), num_workers))


@pytest.mark.slow
def test_flash_attention_gets_the_boundaries_of_samples(release, tiny_processor, monkeypatch):
    """A kernel for packed sequences, by the definition: it gets no mask and need not derive anything from positions."""
    calls = []

    def by_boundaries(module, query, key, value, mask, scaling, cu_seq_lens_q, max_length_k, **kwargs):
        calls.append(cu_seq_lens_q)
        spans = list(pairwise(cu_seq_lens_q.tolist()))
        assert (
            mask is None and cu_seq_lens_q.dtype == torch.int32 and spans[0][0] == 0 and spans[-1][1] == query.shape[2]
        )
        assert max_length_k == max(end - first for first, end in spans)
        parts = [
            scaled_dot_product_attention(
                *(x[:, :, first:end] for x in (query, key, value)), is_causal=True, scale=scaling
            )
            for first, end in spans
        ]
        return torch.cat(parts, 2).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_by_boundaries", by_boundaries)
    stage = replace(tiny(STAGES["II"]), mixture=(Source("multi_round", batch=6, weight=1),))
    stream = open_stream(stage, release, tiny_processor)
    samples = [stream.encode(0, slot) for slot in stream.slots(0)]
    model = prepared(stage).eval()
    expected = model(**pad_batch(samples, 292), use_cache=False).loss
    model.config.text_config._attn_implementation = "flash_by_boundaries"
    batch = pack_batch(samples, Packing.of(model))
    assert len(batch["input_ids"]) == 1
    torch.testing.assert_close(model(**batch, use_cache=False).loss, expected, rtol=1e-5, atol=1e-6)
    assert len(calls) == 3, "in every layer"


@pytest.mark.slow
def test_layers_are_compiled_once_for_all_batches(monkeypatch):
    """Twenty batches of other sizes need no other graphs than the first ten; losses and gradients are those without compiling."""
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model, counter = prepared(tiny(STAGES["II"])).eval(), CompileCounterWithBackend("eager")
    compiled, packing = copy.deepcopy(model), Packing.of(model)
    compile_layers(compiled, counter)
    rng = np.random.default_rng(0)
    shapes, graphs = set(), []
    for _ in range(30):
        batch = pack_batch([random_sample(rng) for _ in range(rng.integers(1, 6))], packing)
        shapes.add(batch["input_ids"].shape)
        losses = [one(**batch, use_cache=False).loss for one in (compiled, model)]
        torch.testing.assert_close(*losses)
        sum(losses).backward()
        graphs.append(counter.frame_count)
    print(f"{len(shapes)} shapes, graphs after each step: {graphs}")
    assert len(shapes) >= 8
    assert graphs[10:] == graphs[-1:] * 20 and graphs[-1] <= 16, (
        "four kinds of layers: first, of any size, of one row or cloud"
    )
    assert not torch._dynamo.utils.counters["graph_break"]
    for one, other in zip(compiled.parameters(), model.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)
    torch.compiler.reset()


def random_sample(rng) -> dict:
    """20 to 300 tokens with a cloud."""
    ids = torch.from_numpy(rng.integers(0, 290, rng.integers(20, 300)))
    ids[5:11] = 293
    labels = ids.clone()
    labels[:12] = -100
    return {"input_ids": ids, "labels": labels, "point_clouds": torch.from_numpy(rng.normal(size=(1, 128, 6))).float()}
