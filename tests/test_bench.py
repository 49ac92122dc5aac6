"""bench.py at its smallest size: every row is there, and `equal` is a comparison and not a wish."""

import json

import pytest
import torch

import bench
import model
import precompute
import train_phase1

KEYS = {"stage", "baseline_s", "ours_s", "ratio", "equal", "peak_mb"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return bench.make_world(bench.parse(["--size", "tiny"]), tmp_path_factory.mktemp("bench"))


def same(world, stage):
    row = bench.BUILD[stage](world)
    return row.equal(row.usual(), row.ours())


def test_every_row_is_measured_and_equal(tmp_path):
    path = tmp_path / "bench.json"
    bench.main(bench.parse(["--size", "tiny", "--repeats", "2", "--out", str(path)]))
    report = json.loads(path.read_text(encoding="utf-8"))
    assert [row["stage"] for row in report["rows"]] == list(bench.BUILD)
    for row in report["rows"]:
        assert row.keys() >= KEYS and row["equal"] is True, row["stage"]
        assert row["ratio"] == pytest.approx(row["baseline_s"] / row["ours_s"])
        assert row["ours_s"] > 0 and row["peak_mb"] > 0 and row["audio_s_per_s"] > 0
    assert report["rows"][1]["transformers_s"] > 0
    assert report["command"] and report["torch"] == torch.__version__


def wrong(function, change):
    """The function, with something done to what it returns."""
    return lambda *args, **kwargs: change(function(*args, **kwargs))


BROKEN = {
    "fbank": (model, "wav_frontend", lambda feats: feats + 0.01),
    "encoder": (model.SANMFeedForward, "forward", lambda x: 1.01 * x),
    "precompute": (precompute, "encode_shard", lambda made: (1.01 * made[0], *made[1:])),
    "phase1_step": (train_phase1, "info_nce", lambda loss: 1.01 * loss),
    "phase2_step": (model, "transcript_loss", lambda made: (1.01 * made[0], *made[1:])),
    "finetune_step": (train_phase1, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16)),
    "infer_batch32": (model, "greedy_decode", lambda made: ([ids[:-1] for ids in made[0]], made[1])),
}  # fmt: skip


@pytest.mark.parametrize("stage", BROKEN)
def test_a_broken_fast_path_is_not_equal(world, monkeypatch, stage):
    owner, name, change = BROKEN[stage]
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name), change))
    assert same(world, stage) is False


def test_gradients_are_compared_too(world, monkeypatch):
    real = model.transcript_loss

    def without_gradient(*args):
        ce, *rest = real(*args)
        return ce.detach() + 0.5 * (ce - ce.detach()), *rest

    monkeypatch.setattr(model, "transcript_loss", without_gradient)
    assert same(world, "phase2_step") is False


def test_batches_of_both_ways_hold_every_clip_once(world):
    rows, size = world.train, world.size["batch"]
    for batches in (bench.random_batches(rows, size), bench.bucketed_batches(rows, size)):
        assert sorted(row["key"] for batch in batches for row in batch) == sorted(row["key"] for row in rows)
        assert len(batches) == -(-len(rows) // size)


def test_the_frozen_llm_is_left_frozen(world):
    row = bench.BUILD["phase2_step"](world)
    row.usual()
    row.ours()
    assert not any(p.requires_grad for p in world.listener.llm.parameters())


def test_missing_demo_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="make demo"):
        bench.main(bench.parse(["--model", str(tmp_path)]))


def test_unknown_stage_is_named():
    with pytest.raises(ValueError, match="'phase3'"):
        bench.main(bench.parse(["--size", "tiny", "--stages", "fbank,phase3"]))


def test_scale_writes_its_table_and_picture(tmp_path, monkeypatch):
    cost = {"precompute": 1.0, "phase2_step": 1.5, "inference": 2.0}
    monkeypatch.setattr(bench, "scale_stage", lambda world, name, seconds, batch: (seconds ** cost[name] * batch, 7.0))
    out = tmp_path / "scale.json"
    bench.main(bench.parse(["--size", "tiny", "--scale", "--scale-hours", "10", "--out", str(out)]))
    table = json.loads(out.read_text(encoding="utf-8"))["scale"]
    found = {row["stage"]: row["exponent"] for row in table if row["against"] == "clip length, s"}
    assert found == pytest.approx(cost)
    assert {row["stage"] for row in table if row["against"] == "corpus, h"} == {
        "index of the cache", "texts, first start", "texts, later starts", "order of an epoch"}
    assert out.with_suffix(".png").stat().st_size > 1000
