"""bench.py at its smallest size: every row is there, and `equal` is a comparison and not a wish."""

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import make_twins
import numpy as np
import peft
import pytest
import soundfile
import torch
import torch.nn.functional as F
from torch import nn

import bench
import finetune_encoder
import infer
import model
import precompute
import train_phase1

KEYS = {"stage", "baseline_s", "ours_s", "ratio", "equal", "peak_mb"}
CPU = torch.device("cpu")
on_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is measured on Linux")


def tiny_world(folder):
    return bench.make_world(bench.parse(["--size", "tiny"]), folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("bench"))


def same(world, stage):
    row = bench.BUILD[stage](world)
    return row.equal(row.usual(), row.ours())


def test_every_row_is_measured_and_equal(tmp_path, monkeypatch, capsys):
    path = tmp_path / "bench.json"
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    bench.main(bench.parse(["--size", "tiny", "--repeats", "2", "--out", str(path)]))
    report = json.loads(path.read_text(encoding="utf-8"))
    assert [row["stage"] for row in report["rows"]] == [name for name in bench.BUILD if name != "infer_batch64"]
    for row in report["rows"]:
        assert row.keys() >= KEYS and row["equal"] is True, row["stage"]
        assert row["ratio"] == pytest.approx(row["baseline_s"] / row["ours_s"])
        assert row["ours_s"] > 0 and row["peak_mb"] > 0 and row["audio_s_per_s"] > 0
        if row["stage"] == "fbank":
            assert "mfu" not in row and "tflops" not in row
        else:
            assert row["mfu"] == pytest.approx(row["tflops"] / report["matmul_tflops"]) and row["tflops"] > 0
    assert report["rows"][1]["transformers_s"] > 0
    assert report["command"] and report["torch"] == torch.__version__
    assert report["environment"]["MALLOC_ARENA_MAX"] == "4" and "PATH" not in report["environment"]
    lines = capsys.readouterr().out.splitlines()
    [header] = [line.split() for line in lines if line.startswith("stage")]
    assert header.count("spread") == 2 and header[-2:] == ["TFLOP/s", "mfu"]
    [encoder] = [line.split() for line in lines if line.startswith("encoder")]
    row = report["rows"][1]
    assert [float(encoder[2]), float(encoder[4])] == pytest.approx(
        [row["baseline_spread_s"], row["ours_spread_s"]], abs=0.0006)
    assert float(encoder[11]) == pytest.approx(row["mfu"], abs=0.006)


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_the_compiled_encoder_is_timed_and_compared_too(tmp_path, monkeypatch, factor):
    monkeypatch.setattr(torch, "compile", lambda net: lambda feats, lens: (factor * net(feats, lens)[0],))
    report = bench.main(bench.parse(["--size", "tiny", "--repeats", "1", "--stages", "encoder", "--compile", "--out",
                                     str(tmp_path / "bench.json")]))
    assert report["rows"][0]["compiled_s"] > 0 and report["rows"][0]["equal"] is (factor == 1.0)


def wrong(function, change):
    """The function, with something done to what it returns."""
    return lambda *args, **kwargs: change(function(*args, **kwargs))


BROKEN = {
    "fbank": (model, "wav_frontend", lambda feats: feats + 0.01),
    "encoder": (model.SANMFeedForward, "forward", lambda x: 1.01 * x),
    "precompute": (precompute, "encode_shard", lambda made: (1.01 * made[0], *made[1:])),
    "phase1_step": (train_phase1, "info_nce", lambda loss: 1.01 * loss),
    "phase2_step": (model, "transcript_loss", lambda made: (1.01 * made[0], *made[1:])),
    "finetune_step": (finetune_encoder.AudioClips, "featurise", lambda made: (made[0].flip(0), made[1])),
    "infer_batch32": (model, "decode_stream", lambda made: [(n, ids[:-1], score) for n, ids, score in made]),
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


def toy_step(world, our_loss):
    """A training row of two matrices: the gradient of one has a norm far over 1, that of the other is small."""
    module = nn.ModuleDict({"large": nn.Linear(4, 4), "small": nn.Linear(4, 4)})

    def losses(batch):
        x = torch.full((len(batch), 4), 0.5)
        return 100 * module["large"](x).sum(), 0.01 * module["small"](x).sum()

    return bench.training(world, world.train, 3, module, lambda batch: sum(losses(batch)),
                          lambda batch: our_loss(*losses(batch)), "")


WRONG_GRADIENTS = {
    "scaled": lambda large, small: 2 * (large + small) - (large + small).detach(),  # clipped, it would be the same
    "zero in the small one": lambda large, small: large + small.detach() + 0 * small,
    "none in the small one": lambda large, small: large + small.detach(),
}


@pytest.mark.parametrize("our_loss", WRONG_GRADIENTS.values(), ids=WRONG_GRADIENTS)
def test_gradients_are_compared_unclipped_and_one_by_one(world, our_loss):
    assert toy_step(world, lambda large, small: large + small).equal() is True
    assert toy_step(world, our_loss).equal() is False


def test_a_step_leaves_no_gradients_that_count_as_the_other_ways_memory(world):
    row = bench.BUILD["phase2_step"](world)
    row.usual()
    assert all(p.grad is None for p in world.listener.llm.parameters())


def test_on_a_gpu_the_usual_way_trains_the_lora_of_its_own_copy(tmp_path):
    """With bf16 there, the usual way has a copy of the LLM in fp32; nothing here needs the GPU itself."""
    world = tiny_world(tmp_path)
    world.dtype, world.tolerance = torch.bfloat16, 0.1
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    llm = world.listener.llm = peft.inject_adapter_in_model(config, world.listener.llm)
    frozen = [name for name, p in llm.named_parameters() if "lora_" not in name and not p.requires_grad_(False).grad]
    row = bench.BUILD["phase2_step"](world)
    assert row.equal(row.usual(), row.ours()) is True
    assert frozen and all(p.requires_grad == ("lora_" in name) for name, p in llm.named_parameters())


def test_the_usual_files_hold_the_clip_and_not_its_padding(tmp_path, monkeypatch):
    world = tiny_world(tmp_path)
    monkeypatch.setattr(bench, "window_features", wrong(
        bench.window_features, lambda made: (F.pad(made[0], (0, 0, 0, 3000)), made[1])))
    bench.BUILD["precompute"](world).usual()
    for row in world.train:
        assert (tmp_path / f"{row['key']}.pt").stat().st_size < 4 * row["frames"] * world.encoder.width + 4096


def test_with_random_weights_answers_are_as_long_as_the_transcripts(world, monkeypatch):
    monkeypatch.setattr(model, "cut_loop", lambda *_, **__: False)  # random weights say the same again and again
    row = bench.BUILD["infer_batch32"](world)
    for texts in (row.usual(), row.ours()):
        assert [len(text.split()) for text in texts] == [len(clip["ids"]) for clip in world.test]
    seconds = sum(clip["seconds"] for clip in world.test)
    assert sum(len(clip["ids"]) for clip in world.test) == pytest.approx(seconds * 15 / 4.52, rel=0.05)
    assert model.token_cap(10.0) == 128  # and it is what it was afterwards


def test_clips_are_heard_whole(tmp_path):
    world = tiny_world(tmp_path)  # noise, in which a VAD would find no speech
    soundfile.write(tmp_path / "long.wav", np.random.default_rng(0).normal(0, 0.05, 16000 * 35), 16000)
    row = world.test[0] | {"source": str(tmp_path / "long.wav"), "seconds": 35.0,
                           "frames": world.encoder.num_frames(16000 * 35)}
    assert len(bench.hear_all(world, [row], 1)) == 1


@pytest.mark.parametrize("batch", [1, 64])
def test_staged_answers_take_drafts_and_show_what_the_llm_would_write(tmp_path, monkeypatch, batch):
    """What bench.py does on a GPU, where greedy answers of random weights would leave their drafts at once."""
    monkeypatch.setattr(infer, "is_gpu", lambda device: True)
    world, passes, real = tiny_world(tmp_path), [], model.hidden_states
    row = bench.inference(world, batch)
    monkeypatch.setattr(model, "hidden_states", lambda *rest: passes.append(1) or real(*rest))
    texts = row.ours()
    assert texts == [clip["target"] for clip in world.test]
    assert len(passes) <= (20 if batch == 1 else 8)  # of 6 clips with some 90 tokens
    assert row.equal(None, texts) is True and row.identical == 1
    for change in (lambda hidden: -hidden, lambda hidden: hidden.roll(1, 1)):
        monkeypatch.setattr(model, "hidden_states", lambda *rest, change=change: change(real(*rest)))
        assert row.equal(None, row.ours()) is False
    monkeypatch.undo()
    assert infer.hear.__module__ == "infer" and model.accept.__module__ == "model"


def big():
    """200 MB in small blocks, freed again except for the last, which keeps the heap from shrinking."""
    blocks = [b"x" * (2000 + number % 2) for number in range(100_000)]
    return blocks[-1]


@on_linux
def test_what_one_way_freed_is_not_the_other_ways_memory():
    _, before, _ = bench.peak_of(lambda: None, CPU)
    kept, most, _ = bench.peak_of(big, CPU)
    _, after, _ = bench.peak_of(lambda: None, CPU)
    assert kept and most > before + 150 and after < before + 50


def only_at_first(function):
    """A function that does something in its first call only."""
    calls = []
    return lambda *_: calls.append(1) or (function() if len(calls) == 1 else None)


@on_linux
def test_memory_is_that_of_the_first_run_and_time_that_of_the_later_ones(world, monkeypatch):
    def slow():
        time.sleep(0.5)
        big()

    row = bench.stage(lambda: None, only_at_first(slow), lambda *_: True, 1.0, "")
    result = bench.measure("fbank", row, SimpleNamespace(repeats=3, baseline_repeats=3), CPU, 1.0)
    assert result["peak_mb"] > result["baseline_peak_mb"] + 150 and result["ours_s"] < 0.1
    row = bench.stage(lambda: None, only_at_first(slow), lambda *_: True, 1.0, "")
    monkeypatch.setitem(bench.BUILD, "precompute", lambda world: row)
    copy = SimpleNamespace(**vars(world) | {"size": dict(world.size)})
    seconds, peak = bench.scale_stage(copy, "precompute", world.test)
    assert seconds < 0.1 and peak > result["baseline_peak_mb"] + 150


@pytest.mark.parametrize("heads", [4, 2])  # of keys and values: 2 are shared
def test_operations_are_counted_forward_and_backward(heads):
    query = torch.randn(2, 4, 7, 16, requires_grad=True)
    key, value = (torch.randn(2, heads, 9, 16, requires_grad=True) for _ in range(2))
    product = 2 * 2 * 4 * 7 * 9 * 16  # (B, H, L, S) from D

    def attention():
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=heads == 2)

    assert bench.count_flops(attention) == 2 * product
    assert bench.count_flops(lambda: attention().sum().backward()) == 7 * product
    layer, x = nn.Linear(16, 5), torch.randn(3, 16)
    assert bench.count_flops(torch.inference_mode()(lambda: layer(x))) == 2 * 3 * 16 * 5


def test_a_crash_leaves_the_rows_that_were_measured(tmp_path, monkeypatch):
    def crash(world):
        raise RuntimeError("no such luck")

    monkeypatch.setitem(bench.BUILD, "encoder", crash)
    path = tmp_path / "bench.json"
    with pytest.raises(RuntimeError, match="luck"):
        bench.main(bench.parse(["--size", "tiny", "--stages", "fbank,encoder", "--repeats", "1", "--out", str(path)]))
    report = json.loads(path.read_text(encoding="utf-8"))
    assert [row["stage"] for row in report["rows"]] == ["fbank"]
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore"),
                                   ModuleNotFoundError("No module named 'funasr'", name="funasr")])
def test_stages_that_cannot_run_here_are_named_and_the_others_run(tmp_path, monkeypatch, capsys, error):
    def fail(world):
        raise error

    monkeypatch.setitem(bench.BUILD, "encoder", fail)
    path = tmp_path / "bench.json"
    bench.main(bench.parse(["--size", "tiny", "--stages", "encoder,fbank", "--repeats", "1", "--out", str(path)]))
    first, second = json.loads(path.read_text(encoding="utf-8"))["rows"]
    problem = str(error).splitlines()[0]
    assert first == {"stage": "encoder", "error": problem} and second["stage"] == "fbank" and second["equal"]
    assert f"encoder: {problem}\n" in capsys.readouterr().out


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


def test_scale_writes_its_table_and_picture(tmp_path, monkeypatch, capsys):
    cost, started = {"precompute": 1.0, "phase2_step": 1.5, "inference": 2.5}, []

    class Pool:
        """In place of a process for each start."""

        def __init__(self, workers, context):
            assert workers == 1 and context.get_start_method() == "spawn"

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, folder, tokenizer):
            count = len((folder / "all.jsonl").read_text(encoding="utf-8").splitlines())
            started.append((count, "MALLOC_ARENA_MAX" in os.environ))
            return SimpleNamespace(result=lambda: {"texts": (count, 300.0), "": (2.0 * count, 300.0 + count)})

    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    monkeypatch.setattr(bench, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench, "scale_stage", lambda world, name, rows: (
        rows[0]["seconds"] ** cost[name] * len(rows), 7.0 + len(rows)))
    out = tmp_path / "scale.json"
    bench.main(bench.parse(["--size", "tiny", "--scale", "--scale-hours", "10", "--out", str(out)]))
    assert started == [(720, False)] * 2 + [(7200, False)] * 2
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["environment"]["MALLOC_ARENA_MAX"] == "4"
    table = {(row["stage"], row["against"]): row for row in report["scale"]}
    for name, slope in cost.items():
        row = table[name, "clip length, s"]
        assert row["exponent"] == pytest.approx(slope) and row["bound"] == 2.0 and row["holds"] is (slope <= 2.0)
        row = table[name, "batch of 5 s clips"]
        assert row["exponent"] == pytest.approx(1.0) and row["bound"] == 1.1 and row["holds"] is True
        assert [point[2] for point in row["points"]] == [7.0 + batch for batch in (1, 2, 4, 8, 16, 32)]
    starts = {stage: row for (stage, against), row in table.items() if against == "corpus, h"}
    assert starts.keys() == {"first start: texts", "first start", "later start: texts", "later start"}
    assert starts["later start"]["points"] == [[1, 1440.0, 1020.0], [10, 14400.0, 7500.0]]
    assert starts["later start"]["exponent"] == pytest.approx(1.0) and starts["later start"]["bound"] == 1.1
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["2.50", "2.0", "NO"] in [line[-3:] for line in printed]
    assert ["8", "39", "1.00", "1.1", "yes"] in [line[-5:] for line in printed]  # MiB at both ends
    assert out.with_suffix(".png").stat().st_size > 1000


def test_scale_hears_the_test_clips_joined_end_to_end(tmp_path):
    world = tiny_world(tmp_path)
    speech = np.concatenate([model.load_audio(row["source"], 16000) for row in world.test])
    rows = bench.scale_rows(world, speech, [1, 2, 3], 60, 2)
    first, second = (model.load_audio(row["source"], 16000).numpy() for row in rows)
    assert len(first) == 60 * 16000 > len(speech)  # so that it begins again
    assert np.allclose(first[: len(speech)], speech, atol=1e-4)
    assert np.allclose(first[len(speech) :][:999], speech[:999], atol=1e-4)
    assert not np.allclose(first, second, atol=1e-2)
    assert [row["ids"][:4] for row in rows] == [[1, 2, 3, 1], [2, 3, 1, 2]]
    assert all(len(row["ids"]) == 199 and row["frames"] == world.encoder.num_frames(60 * 16000) for row in rows)


def test_precompute_against_batch_is_one_batch(tmp_path, monkeypatch):
    world, seen = tiny_world(tmp_path), []
    monkeypatch.setattr(bench.RandomEncoder, "forward", lambda self, feats, lens: seen.append(len(feats)) or (
        torch.zeros(*feats.shape[:2], self.width), lens))
    speech = np.zeros(16000 * 7, np.float32)
    bench.scale_stage(world, "precompute", bench.scale_rows(world, speech, [1], 5, 32))
    assert seen == [32] * 4  # 160 s: once to warm up, three times timed


def test_texts_of_a_corpus_are_varied_and_half_chinese(tmp_path):
    bench.write_corpus(tmp_path, 50_100)  # more than there are prepared texts
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [row["target"] for row in rows]
    assert len(set(texts)) == 50_100 and sum(map(model.is_cjk, texts)) == 25_050
    assert len({text.rsplit(" ", 1)[0] for text in texts}) > 49_000  # they differ in more than their number
    assert all((row["language"] == "zh") == model.is_cjk(row["target"]) for row in rows)
    assert len(train_phase1.EncoderCache(tmp_path).frames) == 50_100


def test_the_first_start_keeps_the_texts_and_the_later_one_maps_them(tmp_path):
    bench.write_corpus(tmp_path, 5000)
    made, found = [], []
    for _ in range(2):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(bench.start_training, tmp_path, make_twins.tiny_tokenizer()).result())
        made.append([(path, path.stat().st_mtime_ns) for path in sorted(tmp_path.glob("utterances-*/*"))])
        stat = (tmp_path / "all.jsonl").stat()  # whoever reads it now finds nothing that is right
        (tmp_path / "all.jsonl").write_bytes(b"?" * stat.st_size)
        os.utime(tmp_path / "all.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert made[0] and made[0] == made[1]
    parts = ["index of the cache", "texts", "order, first batch", "phase 2's lengths", ""]
    for start in found:
        assert list(start) == parts
        assert start[""][0] == pytest.approx(sum(start[part][0] for part in parts[:3]))
        peaks = [peak for _, peak in start.values()]
        assert peaks == sorted(peaks) and peaks[0] > 0
