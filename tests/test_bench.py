"""bench/bench.py at its smallest size: every row is there, and `equal` is a comparison, no wish."""

import json

import pytest

import infer
import model
import train_phase1
from bench import bench


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return bench.World(bench.parse(["--size", "tiny"]), tmp_path_factory.mktemp("bench"))


def test_every_row_is_measured_and_equal(tmp_path, capsys):
    path = tmp_path / "bench.json"
    bench.main(bench.parse(["--size", "tiny", "--repeats", "1", "--out", str(path)]))
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["stage"] for row in rows if row["equal"] is True] == list(bench.ROWS)
    for row in rows:
        assert row["ratio"] == row["usual_s"] / row["ours_s"] > 0
        assert min(row["usual_mb"], row["ours_mb"], row["audio_s_per_s"]) > 0
    assert capsys.readouterr().out.count(" True ") == len(rows)


BROKEN = {
    "fbank": (model, "kaldi_fbank", lambda feats: feats + 0.01),
    "encoder": (model.SANMFeedForward, "forward", lambda x: 1.01 * x),
    "precompute": (model.WhisperEncoder, "forward", lambda made: (1.02 * made[0], made[1])),
    "phase1_step": (train_phase1, "info_nce", lambda loss: 1.01 * loss),
    "phase2_step": (model, "transcript_loss", lambda made: (1.01 * made[0], *made[1:])),
    "infer_batch32": (infer, "decode_drafted", lambda answers: [ids[:-1] for ids in answers]),
}


@pytest.mark.parametrize("stage", BROKEN)
def test_a_broken_fast_path_is_not_equal(world, monkeypatch, stage):
    row, (owner, name, change) = bench.ROWS[stage](world, stage), BROKEN[stage]
    usual, fast = row.usual(), getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **more: change(fast(*args, **more)))
    assert not row.equal(usual, row.ours())


def test_gradients_are_compared_and_not_only_losses(world, monkeypatch):
    row, own = bench.ROWS["finetune_step"](world, "finetune_step"), model.ctc_loss
    factors = iter([1.0, 1.02])  # of the gradient, the usual way's and then ours

    def bent(scores, *rest):
        factor = next(factors)
        return own(factor * scores + (1 - factor) * scores.detach(), *rest)

    monkeypatch.setattr(model, "ctc_loss", bent)
    assert not row.equal()
