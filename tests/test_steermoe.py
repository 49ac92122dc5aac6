"""SteerMoE: hooks against arithmetic by hand, data, every key, the run, recipes, infer.py."""

import io
import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import datasets
import make_twins
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import torch.nn.functional as F
from processes import run_processes
from torch import nn

import infer
import model
import train_steermoe

CONFIGS = Path(__file__).parents[1] / "configs"
STEERING = [f"steering.{name}" for name in ("vectors", "router", "router_bias", "scales")]
BRIDGE = ["bridge.weight", "bridge.bias"]


def config(*arguments):
    arguments = train_steermoe.launcher_options([str(a) for a in arguments])
    return model.load_config(arguments, train_steermoe.DEFAULTS, **train_steermoe.SPELLING)


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def weights(folder, name="steermoe.pt"):
    return torch.load(folder / name, weights_only=True)


def assert_equal(one, two):
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def write_parquet(folder, **columns):
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "train.parquet", row_group_size=5)
    return folder


class World:
    """12 clips, small twins, and the settings of a short run on them."""

    def __init__(self, folder, whisper, qwen3):
        self.manifest, self.whisper = make_twins.wav_files(folder / "wavs", n=12), whisper
        rows = read_lines(self.manifest)
        self.rows = [row | {"source": str(folder / "wavs" / row["source"])} for row in rows]
        self.texts = [row["target"] for row in rows]
        self.audio = [Path(row["source"]).read_bytes() for row in self.rows]
        self.settings = (
            f"llm_decoder.model_name={qwen3} whisper_encoder.model_path={whisper} fp16=false "
            f"parquet_dirs={self.manifest} cache_dir={folder / 'cache'} training.warmup_steps=2 "
            "logging_steps=2 save_steps=2 eval_steps=100 max_steps=4 "
            "log_steering_analysis=false workers=0 device=cpu"
        ).split()

    def config(self, folder, settings="", *more):
        """`settings` holds key=value pairs with spaces between."""
        return config(*self.settings, f"training.output_dir={folder}", *settings.split(), *more)

    def train(self, *arguments):
        return train_steermoe.main(self.config(*arguments))

    def build(self, settings="", *more):
        """SteerMoE, its configuration, Clips of training."""
        cfg = self.config("unused", settings, *more)
        names = cfg[train_steermoe.check(cfg)].model_path, cfg.llm_decoder.model_name
        torch.manual_seed(cfg.seed)
        steermoe = train_steermoe.build(cfg, *names, torch.float32, "cpu", "cpu")
        return steermoe, cfg, train_steermoe.list_clips(cfg.parquet_dirs, cfg, steermoe)

    def refuses(self, folder, settings, message):
        with pytest.raises(model.UserError, match=message):
            self.train(folder, settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory, whisper_folder, qwen3_folder):
    return World(tmp_path_factory.mktemp("world"), whisper_folder, qwen3_folder)


# ---- steering, pooling, bridge ----------------------------------------------


COUNTS = {(32, 896): 1_803_424, (32, 3584): 5_246_752, (16, 3584): 4_918_928}


@torch.no_grad()
@pytest.mark.parametrize(("layers", "wide"), COUNTS)
def test_published_sizes_have_their_counts_and_initial_values(tokenizer, layers, wide):
    cfg = config("training.output_dir=o", "parquet_dirs=p", "llm_decoder.model_name=m")
    blocks, table = [nn.Identity() for _ in range(layers)], nn.Embedding(64, wide)
    table.weight.mul_(0.03)
    encoder = SimpleNamespace(layers=blocks, width=1280, identity={})
    llm = SimpleNamespace(get_input_embeddings=lambda: table, identity={})
    steermoe = train_steermoe.SteerMoE(encoder, llm, tokenizer, cfg)
    assert sum(p.numel() for p in steermoe.trained.parameters()) == COUNTS[layers, wide]
    assert float(steermoe.steering.vectors.std()) == pytest.approx(0.01, rel=0.02)
    assert set(steermoe.steering.scales.tolist()) == {float(torch.tensor(0.1))}
    speech = steermoe.trained["bridge"](torch.randn(200, 1280))  # as loud as the embeddings
    assert model.embedding_rms(speech) == pytest.approx(model.embedding_rms(table.weight), rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["avg", "max"])
def test_the_whole_path_equals_arithmetic_by_hand(world, kind):
    steermoe, _, clips = world.build(f"pooling_type={kind} pooling_kernel_size=3")
    s, net = steermoe.steering, model.load_encoder(world.whisper).net
    s.vectors.mul_(100)
    batch = clips[0, 0, [[3]]]
    x = F.gelu(net.conv2(F.gelu(net.conv1(batch.feats.transpose(1, 2))))).transpose(1, 2)
    x = x + net.embed_positions.weight[: x.shape[1]]
    for n, layer in enumerate(net.layers):
        x = layer(x, None)  # the full router scores the experts of all layers, as upstream
        scores = F.linear(x, s.router.flatten(0, 1), s.router_bias.flatten()).unflatten(-1, (2, 8))
        x = x + s.scales[n] * scores[:, :, n].softmax(-1) @ s.vectors[n]
    parts = net.layer_norm(x).split(3, dim=1)  # a last window of less is pooled as it is
    x = torch.stack([p.mean(1) if kind == "avg" else p.amax(1) for p in parts], dim=1)
    bridge, (speech, lens) = steermoe.trained["bridge"], steermoe.hear(batch.feats, batch.lens)
    assert int(lens) == x.shape[1]
    torch.testing.assert_close(speech, F.linear(x, bridge.weight, bridge.bias))


@torch.no_grad()
@pytest.mark.parametrize("more", ["pooling_type=max", "adaptor=stack pooling_kernel_size=2"])
@pytest.mark.parametrize("kind", ["whisper", "parakeet", "sensevoice"])
def test_padding_changes_nothing_and_positions_are_counted_right(world, request, kind, more):
    folder = request.getfixturevalue(f"{kind}_folder")
    more += f" whisper_encoder.model_path= conformer_encoder.model_path={folder} stack_frames=3"
    steermoe, cfg, clips = world.build(f"{more} max_prompt_tokens=10")
    steermoe.steering.vectors.mul_(100)
    _, positions, _, _ = train_steermoe.select_clips(steermoe, clips, cfg)
    batch, total = clips[0, 0, [list(range(12))]], 0.0
    together, lens = steermoe.hear(batch.feats, batch.lens)
    assert int(lens.min()) < int(lens.max()) <= 10
    spliced = steermoe.splice(batch.feats, batch, [row["ids"] + [1] for row in batch.rows])
    assert spliced.mask.sum(1).tolist() == positions.tolist()
    for n, size in enumerate(lens.tolist()):
        own = clips[0, 0, [[n]]]
        alone, length = steermoe.hear(own.feats, own.lens)
        assert int(length) == size == alone.shape[1]
        torch.testing.assert_close(together[n, :size], alone[0], atol=1e-4, rtol=1e-4)
        total += float(steermoe(own.feats, own)["ce"])
    assert float(steermoe(batch.feats, batch)["ce"]) == pytest.approx(total, rel=1e-4)
    plain = model.load_encoder(folder)(batch.feats, batch.lens)[0]
    assert not torch.equal(steermoe.encoder(batch.feats, batch.lens)[0], plain)
    steermoe.steering.vectors.zero_()  # then the encoder is bit-identical
    assert torch.equal(steermoe.encoder(batch.feats, batch.lens)[0], plain)


# ---- loss, gradients, optimizer ---------------------------------------------


def test_gradients_reach_what_trains_alone_in_eval_and_nothing_waits(world, parakeet_folder):
    other = f"whisper_encoder.model_path= conformer_encoder.model_path={parakeet_folder}"
    steermoe, _, clips = world.build(other)  # whose dropout would act in training
    steermoe.train()
    batch = clips[0, 0, [[0, 1, 2]]]
    loss = steermoe(batch.feats, batch)["ce"]
    assert torch.equal(loss, steermoe(batch.feats, batch)["ce"])
    loss.backward()
    named = [*steermoe.named_parameters(), *steermoe.encoder.named_parameters()]
    reached = {name for name, p in named if p.grad is not None}
    assert reached == {f"trained.{name}" for name in BRIDGE + STEERING}
    for name in STEERING:
        grad = steermoe.trained.get_parameter(name).grad
        assert (grad.view(len(steermoe.encoder.layers), -1).abs().sum(1) > 0).all(), name
    targets = [[*row["ids"], steermoe.stop_id] for row in batch.rows]
    labels = steermoe.splice(batch.feats, batch, targets).labels
    said = [steermoe.tokenizer.decode(row[row != model.IGNORE]) for row in labels]
    assert said == [f" {row['target']}{steermoe.tokenizer.eos_token}" for row in batch.rows]
    steermoe.encoder.to("meta")  # where nothing can be read back: to wait for a GPU is an error
    with pytest.raises(RuntimeError, match="meta"):
        steermoe.to("meta").steering.scales.sum().item()
    steermoe(batch.feats.to("meta"), batch)["ce"].backward()
    nn.utils.clip_grad_norm_(steermoe.trained.parameters(), 1.0)


def test_each_group_moves_at_its_own_rate_and_matrices_decay(world, tmp_path):
    settings = (
        "training.learning_rate=3e-4 steering.steering_learning_rate=2e-2 max_steps=1 "
        "steering.router_learning_rate=5e-3 training.warmup_steps=0 training.weight_decay="
    )
    start, found = world.build()[0].trained.state_dict(), {}
    rates = dict(zip(BRIDGE + STEERING, (3e-4, 3e-4, 2e-2, 5e-3, 5e-3, 5e-3), strict=True))
    for decay in (0, 1):
        world.train(tmp_path / str(decay), settings + str(decay))
        found[decay] = weights(tmp_path / str(decay))
    moved = {name: float((w - start[name]).abs().max()) for name, w in found[0].items()}
    assert moved == pytest.approx(rates, rel=0.02)  # Adam's first step is the rate
    for name, value in found[1].items():
        decay = rates[name] * start[name] * (name in ("bridge.weight", "steering.router"))
        torch.testing.assert_close(value, found[0][name] - decay, atol=1e-7, rtol=1e-5)


def test_clipping_comes_before_the_step_and_0_is_off(world, tmp_path):
    def norms(steering, everything, more=""):
        """Of steering and bridge, as Adam saw them in its first step: its mean is a tenth."""
        folder, squares = tmp_path / f"{steering}-{everything}-{more}", [0.0, 0.0]
        clips = f"steering.steering_gradient_clip={steering} training.gradient_clipping="
        world.train(folder, f"{clips}{everything} max_steps=1 {more}")
        state = weights(folder, "last.pt")["optimizer"]
        for group in state["param_groups"]:
            means = [state["state"][n]["exp_avg"] * 10 for n in group["params"]]
            squares[group["kind"] == "projection"] += sum(float(x.pow(2).sum()) for x in means)
        return [math.sqrt(square) for square in squares]

    free = norms(0, 0)
    assert free[0] > 1e-2 and free[1] > 1e-1
    assert norms(1e-3, 0) == pytest.approx([1e-3, free[1]], rel=1e-3)
    assert norms(1e-3, 0, "clip_steering_gradients=false") == pytest.approx(free)
    assert norms(1e-3, 0, "steering.use_gradient_clipping=false") == pytest.approx(free)
    both = norms(1e-3, 1e-2)
    assert math.hypot(*both) == pytest.approx(1e-2, rel=1e-3) and both[0] < 1e-3


def test_steering_scales_and_adapter_can_be_left_out(world, tmp_path):
    (steered, _, clips), (linear, _, plain) = world.build(), world.build("steering=null")
    bridge = {name: steered.trained.state_dict()[name] for name in BRIDGE}
    assert_equal(linear.trained.state_dict(), bridge)
    steered.steering.vectors.data.zero_()
    batch, same = clips[0, 0, [[0, 1]]], plain[0, 0, [[0, 1]]]
    assert torch.equal(steered(batch.feats, batch)["ce"], linear(same.feats, same)["ce"])
    wide = make_twins.whisper_folder(tmp_path / "wide", width=48)  # as wide as the LLM
    settings = f"whisper_encoder.model_path={wide} use_adapter=false "
    more = "steering.use_layer_scales=false steering.steering_scale=0.25"
    world.train(tmp_path / "run", settings + more)
    assert sorted(weights(tmp_path / "run")) == sorted(STEERING)
    assert weights(tmp_path / "run")["steering.scales"].tolist() == [0.25, 0.25]
    with pytest.raises(model.UserError, match="nothing trains"):
        world.train(tmp_path / "no", settings + "steering=null")


def test_gradient_checkpointing_computes_layers_twice_to_the_same_gradients(world):
    found = []
    for flag in ("false", "true"):
        steermoe, cfg, clips = world.build(f"training.gradient_checkpointing={flag}")
        train_steermoe.prepare(steermoe, None, None, cfg, torch.float32, 1)
        calls, batch = [], clips[0, 0, [[0, 1, 2]]]
        for layer in (*steermoe.encoder.layers, *steermoe.llm.model.layers):
            next(layer.children()).register_forward_hook(lambda *_, calls=calls: calls.append(1))
        steermoe(batch.feats, batch)["ce"].backward()
        found.append((len(calls), {k: p.grad for k, p in steermoe.trained.named_parameters()}))
    # of two encoder and two LLM layers, all but the first: nothing trains before it
    assert [count for count, _ in found] == [4, 7]
    assert_equal(found[0][1], found[1][1])


def test_fp16_is_bf16_for_qwen_and_scales_the_loss_for_others(world, tmp_path, capsys, monkeypatch):
    world.train(tmp_path / "qwen", "fp16=true max_steps=2")
    said = capsys.readouterr().out
    assert "bf16 is used; Qwen overflows in fp16" in said and "torch.bfloat16" in said
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    cfg = world.config("o", f"fp16=true llm_decoder.model_name={tmp_path}")
    assert train_steermoe.precision(cfg) == "fp16"
    monkeypatch.setattr(train_steermoe, "precision", lambda cfg: "fp16")
    world.train(tmp_path / "run")  # this twin overflows too: such steps are left out
    row = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert 1 < row["scale"] < 2**16 and 0 < row["grad_norm"] < 100 and math.isfinite(row["ce"])
    assert {w.dtype for w in weights(tmp_path / "run").values()} == {torch.float32}
    world.train(tmp_path / "run", "resume=true max_steps=5")
    assert read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["scale"] <= row["scale"]


# ---- the run ----------------------------------------------------------------


def test_a_run_killed_in_a_step_resumes_to_the_same_bits(world, tmp_path, monkeypatch):
    settings = f"eval_dirs={world.manifest} eval_steps=2 resume=true"
    world.train(tmp_path / "whole", settings)
    real, steps = train_steermoe.take_step, []

    def killed_in_the_fourth(*rest):
        steps.append(1)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*rest)

    cfg = world.config(tmp_path / "killed", settings)
    with monkeypatch.context() as patch, pytest.raises(AssertionError, match="SIGKILL"):
        patch.setattr(train_steermoe, "take_step", killed_in_the_fourth)
        run_processes(train_steermoe.main, cfg, world=1)
    assert weights(tmp_path / "killed", "last.pt")["step"] == 2
    train_steermoe.main(cfg)
    whole, killed = (weights(tmp_path / name, "last.pt") for name in ("whole", "killed"))
    assert_equal(whole["trained"], killed["trained"])
    for number, entry in whole["optimizer"]["state"].items():
        assert_equal(entry, killed["optimizer"]["state"][number])
    assert all(whole[k] == killed[k] for k in ("step", "epoch", "used", "best", "stale"))
    assert_equal(weights(tmp_path / "whole"), weights(tmp_path / "killed"))


def test_two_processes_on_parquet_equal_one_with_the_doubled_batch(world, tmp_path):
    data = write_parquet(tmp_path / "data", sound=world.audio, words=world.texts)
    settings = f"parquet_dirs={data} eval_dirs={data} audio_column=sound text_column=words "
    settings += "eval_steps=4 training.batch_size="
    cfg = world.config(tmp_path / "two", f"{settings}3 cache_dir={tmp_path / 'cache'}")
    run_processes(train_steermoe.main, cfg)
    world.train(tmp_path / "one", f"{settings}6")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-4)
    logs = [read_lines(tmp_path / name / "metrics.jsonl")[-2:] for name in ("one", "two")]
    assert logs[0][1] == pytest.approx(logs[1][1], rel=1e-4)  # the scores
    assert logs[0][0]["grad_norm"] == pytest.approx(logs[1][0]["grad_norm"], rel=1e-4)
    world.train(tmp_path / "plain", "training.batch_size=6")  # from the manifest
    assert_equal(one, weights(tmp_path / "plain"))


def test_a_run_that_stopped_early_stays_stopped(world, tmp_path, capsys):
    rates = ("learning_rate", "steering_learning_rate", "router_learning_rate")
    settings = " ".join(f"training.{name}=0" for name in rates) + f" eval_dirs={world.manifest}"
    settings += " eval_steps=1 max_steps=9 early_stopping_patience=2 resume=true"
    for _ in range(2):  # the first evaluation is the best, two are no better
        world.train(tmp_path, settings)
        steps = [r["step"] for r in read_lines(tmp_path / "metrics.jsonl") if "error_rate" in r]
        assert steps == [1, 2, 3] and weights(tmp_path, "last.pt")["step"] == 3
    assert "stopped early at step 3" in capsys.readouterr().out
    world.train(tmp_path, f"{settings} use_early_stopping=false max_steps=4")
    assert weights(tmp_path, "last.pt")["step"] == 4


def test_copies_epochs_logs_and_what_a_resumed_run_refuses(world, tmp_path):
    board = tmp_path / "board"  # 12 clips in batches of 4, twice
    settings = f"training.logging_dir={board} logging_steps=1 save_steps=1 training.epochs=2 "
    world.train(tmp_path, settings + "max_steps=0 training.warmup_steps=4 save_total_limit=2")
    names = ["last.pt", "steermoe.pt", "step-0000005.pt", "step-0000006.pt"]
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == names
    assert list(board.glob("events*")) and not list(tmp_path.glob("events*"))
    rates = [row["lr_steering"] for row in read_lines(tmp_path / "metrics.jsonl")[:4]]
    assert rates == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])
    world.refuses(tmp_path, "", "holds a run")
    world.refuses(tmp_path, "resume=true pooling_type=max", "pooling_type was avg, is max")
    world.refuses(tmp_path, "resume=true steering.num_experts=3", "does not fit")


def test_gate_usage_counts_query_frames_and_real_frames_only():
    steering, one = train_steermoe.Steering(1, 2, 4), [[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]
    front, two = [0.7, 0.3], [[0.6, 0.4], [0.0, 1.0], [0.0, 1.0]]  # lens know of no front
    steering.seen = [torch.tensor([[front, *one], [front, *two]])]
    (row,) = train_steermoe.gate_usage(steering, torch.tensor([3, 1]))
    real = [front, front, *one, two[0]]
    means = [sum(gates) / 6 for gates in zip(*real, strict=True)]
    entropy = -sum(p * math.log(p) for gates in real for p in gates) / 6
    assert row["gates"] == pytest.approx(means, abs=1e-5) and row["top"] == pytest.approx(5 / 6)
    assert row["entropy"] == pytest.approx(entropy, abs=1e-5)
    assert row["norms"] == pytest.approx(steering.vectors[0].norm(dim=1).tolist(), abs=1e-5)


# ---- data -------------------------------------------------------------------


def test_clips_of_several_data_sets_are_measured_once(world, tmp_path, monkeypatch):
    write_parquet(tmp_path / "p", audio=world.audio[:5], text=world.texts[:5])
    rest = {"audio": world.audio[5:], "text": world.texts[5:]}
    datasets.Dataset.from_dict(rest).save_to_disk(tmp_path / "d" / "batch_0_0")
    _, _, plain = world.build()
    for _ in range(2):
        specs = f"cache_dir={tmp_path / 'c'} parquet_dirs={tmp_path / 'p'},{tmp_path / 'd'}"
        _, _, clips = world.build(specs)
        monkeypatch.setattr(model, "audio_seconds", None)  # the second time, all is known
    for n in range(12):
        one, two = (table[0, 0, [[n]]] for table in (clips, plain))
        assert torch.equal(one.feats, two.feats) and one.labels == two.labels
        for name in ("seconds", "ids", "target"):
            assert one.rows[0][name] == two.rows[0][name]


def test_clips_that_cannot_be_read_are_named_counted_and_limited(world, tmp_path):
    long, good = io.BytesIO(), world.audio[:4]
    soundfile.write(long, np.full(16000 * 31, 0.01), 16000, format="WAV")
    cells = [*good, b"", b"no audio", None, good[0][:9000], long.getvalue(), good[0]]
    texts = ["one"] * 9 + ["..."]
    data = write_parquet(tmp_path / "data", audio=pa.array(cells, pa.binary()), text=texts)

    def dropped(settings):
        world.train(tmp_path / settings, f"parquet_dirs={data} max_steps=6 {settings}")
        rows = read_lines(tmp_path / settings / "dropped.jsonl")
        return {int(row["key"].rpartition(":")[2]): row["reason"] for row in rows}

    found = dropped("max_dropped=4")
    assert sorted(found) == list(range(4, 10))
    assert found[8] == "31 is over max_audio_length" and found[9] == "empty text"
    assert "truncated" in found[7]  # what no header shows, a worker finds
    assert "longer than Whisper's 30 s" in dropped("filter_dataset=false")[8]
    _, _, clips = world.build(f"parquet_dirs={data}")
    batch = clips[0, 0, [[0, 7]]]  # silence takes the place of the truncated one, without labels
    assert batch.labels == len(clips.table[0]["ids"]) + 1
    for most in (2, 3):  # three are known at the start, the truncated one is met in a step
        with pytest.raises(model.UserError, match=f"more clips than max_dropped={most} cannot"):
            dropped(f"max_dropped={most}")


def test_each_limit_leaves_the_longer_clips_out(world):
    steermoe, cfg, clips = world.build()
    sizes = {"max_text_length": [len(ids) for ids in clips.table["ids"]]}
    sizes["max_audio_length"] = clips.table["seconds"][:]
    sizes["llm_decoder.max_length"] = train_steermoe.select_clips(steermoe, clips, cfg)[1]
    for key, found in sizes.items():
        cfg = world.config("unused", f"{key}={sorted(found)[6]}")
        kept, _, filtered, _ = train_steermoe.select_clips(steermoe, clips, cfg)
        assert kept.tolist() == [n for n in range(12) if found[n] <= sorted(found)[6]]
        assert len(filtered) == 12 - len(kept) and all(key in row["reason"] for row in filtered)


def test_texts_are_normalised_and_questions_stand_in_the_prompt(world, tmp_path):
    texts, asked = ["Go ON."] * 12, [f"is it {n}?" for n in range(12)]
    data = write_parquet(tmp_path / "data", audio=world.audio, text=texts, asked=asked)
    for flag, expected in (("true", " go on"), ("false", " Go ON.")):
        more = f"parquet_dirs={data} normalize_text={flag} pad_to_30s=true"
        steermoe, _, clips = world.build(more)
        assert steermoe.tokenizer.decode(clips.table["ids"][0]) == expected
    assert clips[0, 0, [[0]]].lens.tolist() == [3000]
    prompts = "textual_prompt=Answer: ", "system_prompt=Be brief."
    qa = f"parquet_dirs={data} task=qa question_column=asked"
    steermoe, _, clips = world.build(qa, *prompts)
    before = [steermoe.tokenizer.decode(steermoe.prompt(row)[0]) for row in clips.table]
    assert all(text.endswith(f"Answer: {q}") for text, q in zip(before, asked, strict=True))
    assert "system\nBe brief." in before[0]


# ---- evaluation, recipes, infer.py ------------------------------------------


def test_scores_by_hand_and_qa_is_exact_never_a_substring():
    def scores(task, *pairs):
        rows = [{"target": target, "text": text} for target, text in pairs]
        return train_steermoe.text_scores(rows, task)

    found = scores("asr", ("Press one.", "press one"), ("hold on", "hold"))
    assert found["wer_raw"] == 3 / 4 and found["wer"] == found["error_rate"] == 1 / 4
    assert found["cer"] == 2 / 14 and found["cer_raw"] == 4 / 15
    assert scores("asr", ("今天", "今"))["error_rate"] == 1 / 2
    found = scores("qa", ("Yes", "yes!"), ("yes", "yes it is"), ("two dogs", "dogs"))
    assert found["exact_match"] == 1 / 3 and found["error_rate"] == pytest.approx(2 / 3)


def recipe(name):
    return CONFIGS / "steermoe" / f"{name}.yaml"


RECIPES = """
    layer_wise_whisper_qwen7b_libri_train layer_wise_whisper_qwen7b_libri_test
    layer_wise_whisper_qwen7b_aishell_train layer_wise_whisper_qwen7b_aishell_test
    layer_wise_whisper_qwen7b_clothoaqa_train layer_wise_whisper_qwen7b_clothoaqa_test
    layer_wise_conformer_qwen7b_libri_train layer_wise_conformer_qwen7b_aishell_train
    layer_wise_whisper_qwen3b_libri_train linear_whisper_qwen7b_libri_train
    linear_conformer_qwen3b_libri_train"""


@pytest.mark.parametrize("name", RECIPES.split())
def test_a_recipe_of_the_guide_loads_and_says_only_what_differs(name):
    common, select = model.OmegaConf.create(train_steermoe.DEFAULTS), model.OmegaConf.select
    cfg, given = config(recipe(name)), model.flatten(model.read_yaml(recipe(name)))
    assert len(given) <= 9 and all(select(cfg, key) != select(common, key) for key in given)
    assert (cfg.steering is None) == name.startswith("linear") and cfg.mode in name
    twin = config(recipe(name.replace("test", "train")))  # whose weights a test reads
    assert cfg.training.output_dir == twin.training.output_dir
    assert all(cfg[key] == twin[key] for key in train_steermoe.SETTINGS)


USED = {
    "whisper": ("layer_wise_whisper_qwen7b_clothoaqa_train", "pooling_kernel_size=2"),
    "parakeet": ("linear_conformer_qwen3b_libri_train", "adaptor=stack stack_frames=2"),
    "sensevoice": ("layer_wise_conformer_qwen7b_aishell_train", "pooling_type=max"),
}


@pytest.mark.parametrize("kind", USED)
def test_a_recipe_trains_is_tested_on_whole_sets_and_heard(world, tmp_path, request, kind, capsys):
    (name, more), folder = USED[kind], request.getfixturevalue(f"{kind}_folder")
    run, spec, test = tmp_path / "run", tmp_path / "m.jsonl", tmp_path / "t.jsonl"
    rows = [row | {"question": "what?"} for row in world.rows]
    gone = {"key": "gone", "source": "gone.wav", "target": "one two", "question": "what?"}
    model.save(spec, rows), model.save(test, [*rows, gone])
    more += f" {name.split('_')[-4]}_encoder.model_path={folder} training.output_dir={run}"
    more += f" parquet_dirs={spec} eval_dirs={spec} training.batch_size=12 max_steps=10 device=cpu"
    more += " training.learning_rate=1e-2 training.warmup_steps=2 logging_steps=5 fp16=false"
    more += " steering_log_interval=7 llm_decoder.use_cache=false workers=1 textual_prompt=Say:"
    more = [f"--config={recipe(name)}", "--local_rank=0", world.settings[0], *more.split()]
    train_steermoe.main(config(*more))
    assert "use_cache=false: decoding keeps its cache" in capsys.readouterr().out
    first, last, scores = read_lines(run / "metrics.jsonl")
    assert last["ce"] < 0.95 * first["ce"] and last["acc"] > first["acc"]
    assert ("exact_match" in scores) == (kind == "whisper") and "cer_raw" in scores
    assert (run / "gates.png").is_file() == (run / "steering.jsonl").is_file() == ("wise" in name)
    logged = read_lines(run / "steering.jsonl") if "wise" in name else []
    assert [row["step"] for row in logged] == [7, 10][: len(logged)]
    more += ["mode=test", f"parquet_dirs={test}", "max_text_length=1"]
    summary = train_steermoe.main(config(*more))  # no limit of training shrinks a test set
    assert (summary["clips"], summary["eval_dropped"]) == (13, 1)
    written = {row["key"]: row for row in read_lines(run / "test.jsonl")}
    assert "No such file" in written["gone"]["reason"] and written["gone"]["text"] == ""
    pairs = [(row["target"], written[row["key"]]["text"]) for row in [*rows, gone]]
    assert summary["wer"] == model.error_rate(*zip(*pairs, strict=True))["rate"]
    assert len({text for _, text in pairs}) > 2  # it does not say the same to all
    inputs = [f"model.dir={run}", str(spec), "workers=0", "device=cpu", f"out={run / 'o.jsonl'}"]
    infer.main(model.load_config(infer.split_arguments(inputs), infer.DEFAULTS))
    heard = {row["key"]: row["text"] for row in read_lines(run / "o.jsonl")}
    assert heard == {key: row["text"] for key, row in written.items() if key != "gone"}
    with pytest.raises(model.UserError, match="textual_prompt was Say:, is Tell:"):
        train_steermoe.main(config(*more, "textual_prompt=Tell:"))


def test_the_spellings_of_the_guide_work(tmp_path):
    file, zero = tmp_path / "a=b.yaml", CONFIGS / "stage2_simple.json"
    file.write_text("fp16: no\nsteering: {steering_learning_rate: 3e-3}\n", encoding="utf-8")
    some = recipe("layer_wise_whisper_qwen7b_libri_train")
    cfg = config("--local_rank=1", "--config", some, file, "--deepspeed_config", zero)
    assert cfg.training.fp16 is False and cfg.training.steering_learning_rate == 3e-3
    assert cfg.deepspeed_config == str(zero)
    with pytest.raises(model.UserError, match="deepspeed_config.*deepspeed"):
        train_steermoe.zero_settings(cfg)  # the package is missing here, or else its launcher
    cfg.training.use_deepspeed = False
    assert train_steermoe.zero_settings(cfg) is None


REFUSED = {
    "whisper_encoder.feature_dim=1280": "feature_dim=1280: has to be 32",
    "whisper_encoder.num_layers=32": "num_layers=32: has to be 2",
    "sample_rate=8000": "sample_rate=8000: has to be 16000",
    "pooling_position=1": "pooling_position=1: has to be 2",
    "conformer_encoder.model_path=x": "give whisper_encoder.model_path or conformer",
    "parquet_dirs=": "required key not given: parquet_dirs",
    "mode=eval": "mode: expected one of train, test",
    "steering.num_experts=0": "steering.num_experts: has to be at least 1",
    "use_adapter=false": "use_adapter=false: the encoder has 32, the LLM 48",
    "mode=test": "no config.json of a training",
    "max_text_length=0": "no clip is left to train on: .* over max_text",
    "task=qa": "12 clips have no question; task=qa needs them",
}


@pytest.mark.parametrize("settings", REFUSED)
def test_what_cannot_be_is_refused_by_name(world, tmp_path, settings):
    world.refuses(tmp_path, settings, REFUSED[settings])
