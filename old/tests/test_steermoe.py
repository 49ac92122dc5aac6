"""SteerMoE: the hooks against arithmetic by hand, every key of its configuration, its data, and the shipped recipes."""

import io
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import make_twins
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import infer
import model
import train_steermoe

ROOT = Path(__file__).parents[1]
TRAIN = [f"{name}_train" for name in (
    "layer_wise_whisper_qwen7b_libri", "layer_wise_whisper_qwen3b_libri", "layer_wise_conformer_qwen7b_libri",
    "layer_wise_whisper_qwen7b_aishell", "layer_wise_conformer_qwen7b_aishell", "layer_wise_whisper_qwen7b_clothoaqa",
    "linear_whisper_qwen7b_libri", "linear_conformer_qwen3b_libri")]
TEST = [f"layer_wise_whisper_qwen7b_{data}_test" for data in ("libri", "aishell", "clothoaqa")]
SETTINGS = {"steering.num_experts": 4, "steering.steering_scale": 0.1, "steering.use_layer_scales": True,
            "adaptor": "linear", "stack_frames": 3, "stack_hidden": 24, "max_prompt_tokens": 2048, "use_adapter": True,
            "pooling_kernel_size": 2, "pooling_position": 0, "pooling_type": "avg"}


def call(*arguments):
    arguments = train_steermoe.split_arguments([str(argument) for argument in arguments])
    return train_steermoe.main(train_steermoe.load_config(arguments, train_steermoe.DEFAULTS))


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(params=["whisper", "parakeet", "sensevoice"])
def encoder(request, whisper_folder, parakeet_folder, sensevoice_folder):
    folder = {"whisper": whisper_folder, "parakeet": parakeet_folder, "sensevoice": sensevoice_folder}[request.param]
    return model.load_encoder(folder)


def clips(encoder, seconds=(1.3, 0.5, 0.9)):
    """A padded batch of features, and each clip alone: [(feats (B, T, F), lens (B,))]."""
    generator = np.random.default_rng(0)
    waves = [torch.tensor(generator.normal(0, 0.1, round(s * 16000)).astype(np.float32)) for s in seconds]
    feats = [encoder.features(wave, str(n)) for n, wave in enumerate(waves)]
    batch = nn.utils.rnn.pad_sequence(feats, batch_first=True), torch.tensor([len(f) for f in feats])
    return batch, [(f[None], torch.tensor([len(f)])) for f in feats]


def steer(encoder, llm_width=48, **changes):
    return model.SteerMoE(encoder, llm_width, SETTINGS | changes)


# ---- Parakeet ---------------------------------------------------------------------------------------------------


def test_parakeet_equals_transformers_and_its_length_formula(parakeet_folder):
    from transformers import ParakeetFeatureExtractor, ParakeetForCTC

    encoder = model.load_encoder(parakeet_folder)
    waves = [torch.randn(n).numpy() for n in (16000, 9111, 1600, 12345)]
    inputs = ParakeetFeatureExtractor.from_pretrained(parakeet_folder)(waves, sampling_rate=16000, return_tensors="pt")
    net = ParakeetForCTC.from_pretrained(parakeet_folder).eval()
    with torch.no_grad():
        expected = net.model(**inputs) if hasattr(net, "model") else net.encoder(**inputs)
        for index, wave in enumerate(waves):
            feats = encoder.features(torch.tensor(wave))
            enc, lens = encoder(feats[None], torch.tensor([len(feats)]))
            frames = int(expected.attention_mask[index].sum())
            assert int(lens) == enc.shape[1] == encoder.num_frames(len(wave)) == frames
            torch.testing.assert_close(enc[0], expected.last_hidden_state[index, : int(lens)], atol=2e-5, rtol=0)


def test_parakeet_refuses_a_clip_of_one_frame(parakeet_folder):
    with pytest.raises(model.AudioError, match="shorter than two frames"):
        model.load_encoder(parakeet_folder).features(torch.zeros(300), "x")


# ---- steering ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_zero_vectors_leave_the_encoder_bit_identical(encoder):
    (feats, lens), _ = clips(encoder)
    before = encoder(feats, lens)
    trained = steer(encoder, pooling_kernel_size=1)
    assert not torch.equal(encoder(feats, lens)[0], before[0])
    trained.steering.vectors.zero_()
    after = encoder(feats, lens)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


def test_the_slice_of_the_router_equals_the_full_router():
    steering = model.Steering(5, 4, 16, scale=0.3)
    h = torch.randn(2, 7, 16)
    full = F.linear(h, steering.router.flatten(0, 1), steering.router_bias.flatten()).unflatten(-1, (5, 4))
    for layer in range(5):
        expected = h + 0.3 * full[:, :, layer].softmax(-1) @ steering.vectors[layer]
        torch.testing.assert_close(steering(layer, h), expected)


def test_initial_values_are_the_documented_ones():
    steering = model.Steering(32, 8, 1280, scale=0.1)
    assert float(steering.vectors.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert set(steering.scales.tolist()) == {float(torch.tensor(0.1))}


class Stub(nn.Module):
    """What SteerMoE needs of an encoder, with weights that take no memory."""

    def __init__(self, layers, width):
        super().__init__()
        self.net, self.width = nn.Module(), width
        self.net.layers = nn.ModuleList(nn.Identity() for _ in range(layers))


FULL = SETTINGS | {"steering.num_experts": 8, "pooling_kernel_size": 4}


@pytest.mark.parametrize(("layers", "llm_width", "count"), [
    (32, 896, 1_803_424), (32, 2048, 3_279_136), (32, 3584, 5_246_752), (16, 3584, 4_918_928)])
def test_parameter_counts_of_the_published_sizes(layers, llm_width, count):
    with torch.device("meta"):
        trained = model.SteerMoE(Stub(layers, 1280), llm_width, FULL)
    assert sum(p.numel() for p in trained.parameters() if p.requires_grad) == count


def test_the_layers_of_whisper_large_v3_are_found_on_empty_weights():
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    with torch.device("meta"):
        stub = Stub(0, 1280)
        stub.net = WhisperEncoder(WhisperConfig(d_model=1280, encoder_layers=32, encoder_attention_heads=20,
                                                encoder_ffn_dim=5120, num_mel_bins=128))
        trained = model.SteerMoE(stub, 3584, FULL)
    assert sum(p.numel() for p in trained.parameters()) == 5_246_752
    assert all(len(layer._forward_hooks) == 1 for layer in stub.net.layers)


def test_a_full_size_file_is_about_20_mb_and_loads_strictly(tmp_path):
    trained = model.SteerMoE(Stub(32, 1280), 3584, FULL)
    torch.save(trained.state_dict(), tmp_path / "steermoe.pt")
    assert 20e6 < (tmp_path / "steermoe.pt").stat().st_size < 22e6
    weights = model.read_weights(tmp_path / "steermoe.pt")
    model.load_steermoe(trained, weights, "steermoe.pt")
    del weights["bridge.bias"]
    with pytest.raises(ValueError, match="(?s)steermoe.pt: does not fit.*bridge.bias"):
        model.load_steermoe(trained, weights, "steermoe.pt")


@pytest.mark.parametrize("sizes", [(5, 8, 64), (4, 6, 64), (4, 8, 32)])
def test_weights_of_other_sizes_are_refused_with_both_numbers(sizes):
    weights = model.SteerMoE(Stub(sizes[0], sizes[2]), 48, SETTINGS | {"steering.num_experts": sizes[1]}).state_dict()
    here = model.SteerMoE(Stub(4, 64), 48, SETTINGS | {"steering.num_experts": 8})
    with pytest.raises(ValueError, match="old.pt: was trained with {} layers, {} experts, width {}; this "
                                         "configuration has 4 layers, 8 experts, width 64".format(*sizes)):
        model.load_steermoe(here, weights, "old.pt")


def test_hooks_work_on_layers_that_return_tuples():
    class Old(nn.Module):
        def forward(self, x, mask):
            return x + 1, "attention weights"

    stub = Stub(0, 16)
    stub.net.layers = nn.ModuleList([Old(), Old()])
    trained = model.SteerMoE(stub, 48, SETTINGS)
    x = torch.randn(1, 5, 16)
    out = stub.net.layers[1](x, None)
    assert out[1] == "attention weights"
    torch.testing.assert_close(out[0], trained.steering(1, x + 1))


# ---- pooling and bridge -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["avg", "max"])
def test_pooling_counts_real_frames_only(kind):
    x, lens = -torch.rand(3, 7, 4) - 1, [7, 5, 2]  # negative: a zero of the padding would win every maximum
    for row, n in enumerate(lens):
        x[row, n:] = math.nan
    pooled, real = model.pool_frames(x, model.length_mask(torch.tensor(lens), 7), 3, kind)
    assert pooled.shape == (3, 3, 4) and real.sum(1).tolist() == [3, 2, 1]
    for row, n in enumerate(lens):
        for s in range(math.ceil(n / 3)):
            window = x[row, 3 * s : min(3 * s + 3, n)]
            torch.testing.assert_close(pooled[row, s], window.mean(0) if kind == "avg" else window.amax(0))
    assert torch.equal(pooled[~real], torch.zeros_like(pooled[~real]))


@torch.no_grad()
def test_the_whole_path_equals_arithmetic_by_hand(whisper_folder):
    """Whisper, pooling after layer 1 of 2: layer 0, steering, pooling, layer 1, steering, norm, projection."""
    plain, hooked = model.load_encoder(whisper_folder), model.load_encoder(whisper_folder)
    trained = steer(hooked, pooling_position=1, pooling_kernel_size=3, pooling_type="max")
    trained.steering.vectors.mul_(100)
    feats, net = torch.randn(1, 40, 80), plain.net
    x = F.gelu(net.conv2(F.gelu(net.conv1(feats.transpose(1, 2))))).transpose(1, 2) + net.embed_positions.weight[:20]
    x = trained.steering(0, net.layers[0](x, None))
    x = torch.stack([x[:, s : s + 3].amax(1) for s in range(0, 20, 3)], dim=1)
    x = net.layer_norm(trained.steering(1, net.layers[1](x, None)))
    enc, lens = hooked(feats, torch.tensor([40]))
    assert lens.tolist() == [7]
    torch.testing.assert_close(enc, x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(trained(enc, lens)[0], F.linear(x, trained.bridge.weight, trained.bridge.bias))


@torch.no_grad()
@pytest.mark.parametrize("position", [1, 0])
@pytest.mark.parametrize("adaptor", ["linear", "stack"])
def test_padding_changes_no_speech_position(encoder, position, adaptor):
    if position and isinstance(encoder, model.KaldiEncoder):
        with pytest.raises(ValueError, match="four query frames"):
            steer(encoder, pooling_position=position)
        return
    trained = steer(encoder, pooling_position=position, adaptor=adaptor)
    trained.steering.vectors.mul_(100)
    batch, singles = clips(encoder)
    together, lens = trained(*encoder(*batch))
    for row, single in enumerate(singles):
        alone, length = trained(*encoder(*single))
        assert int(length) == int(lens[row]) == alone.shape[1]
        torch.testing.assert_close(together[row, : int(length)], alone[0], atol=1e-4, rtol=1e-4)


def test_pooling_settings_that_cannot_be_are_refused(whisper_folder):
    encoder = model.load_encoder(whisper_folder)
    with pytest.raises(ValueError, match="pooling_position=32, but the encoder has 2 layers"):
        steer(encoder, pooling_position=32)
    with pytest.raises(ValueError, match="pooling_type avg or max"):
        steer(encoder, pooling_type="mean")
    with pytest.raises(ValueError, match="use_adapter=false, but the encoder is 32 wide and the LLM 48"):
        steer(encoder, use_adapter=False)


def test_speech_is_cut_to_max_prompt_tokens(whisper_folder):
    encoder = model.load_encoder(whisper_folder)
    emb, lens = steer(encoder, max_prompt_tokens=4)(torch.randn(2, 9, 32), torch.tensor([9, 3]))
    assert emb.shape == (2, 4, 48) and lens.tolist() == [4, 3]


def test_the_bridge_starts_as_loud_as_the_embeddings(whisper_folder):
    trained = model.SteerMoE(model.load_encoder(whisper_folder), 512, SETTINGS, embedding_rms=0.1)
    emb, _ = trained(torch.randn(1, 500, 32), torch.tensor([500]))
    assert float(emb.detach().pow(2).mean().sqrt()) == pytest.approx(0.1, rel=0.15)


# ---- a small world ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory, whisper_folder, qwen3_folder):
    folder = tmp_path_factory.mktemp("world")
    manifest = make_twins.wav_files(folder / "wavs", n=12)
    shared = [f"whisper_encoder.model_path={whisper_folder}", f"llm_decoder.model_name={qwen3_folder}",
              f"parquet_dirs={manifest}", "training.batch_size=4", "training.warmup_steps=2", "logging_steps=2",
              "eval_steps=100", "save_steps=2", "dataloader_num_workers=0", "steering.num_experts=4", "max_steps=4",
              "steering_log_interval=2", "device=cpu"]
    return types.SimpleNamespace(folder=folder, manifest=manifest, arguments=shared, whisper=whisper_folder,
                                 qwen3=qwen3_folder, rows=lines(manifest))


def settings_of(world, *arguments):
    arguments = train_steermoe.split_arguments([*world.arguments, "training.output_dir=unused", *map(str, arguments)])
    return train_steermoe.load_config(arguments, train_steermoe.DEFAULTS)


def parts_of(world, *arguments):
    cfg = settings_of(world, *arguments)
    return train_steermoe.build(cfg, train_steermoe.check_config(cfg), torch.device("cpu"), torch.float32), cfg


def one_batch(parts, cfg, count=None):
    train, _ = train_steermoe.list_utterances(cfg["parquet_dirs"], cfg, parts, filtered=True)
    order = list(range(len(train)))[:count]
    return next(train_steermoe.read_batches(train, [order], parts.encoder, cfg, []))


def trained_weights(folder):
    return model.read_weights(folder / "steermoe.pt")


def newest(folder):
    return torch.load(train_steermoe.checkpoints(folder)[-1], weights_only=True)


# ---- loss, gradients, optimiser ---------------------------------------------------------------------------------


def test_gradients_reach_the_trainable_parts_and_nothing_else(world):
    parts, cfg = parts_of(world)
    loss, _, _ = parts(*one_batch(parts, cfg))
    loss.backward()
    assert {name for name, p in parts.named_parameters() if p.grad is not None} == {
        f"trained.{name}" for name in ("steering.vectors", "steering.router", "steering.router_bias",
                                       "steering.scales", "bridge.weight", "bridge.bias")}
    assert {name for name, p in parts.named_parameters() if p.requires_grad} == {
        f"trained.{name}" for name, _ in parts.trained.named_parameters()}
    for layer in range(2):
        assert all(float(getattr(parts.trained.steering, name).grad[layer].abs().sum()) > 0
                   for name in ("vectors", "router", "router_bias", "scales"))


def test_encoder_and_llm_stay_in_eval_with_dropout_off(world, parakeet_folder):
    parts, cfg = parts_of(world, "whisper_encoder.model_path=", f"conformer_encoder.model_path={parakeet_folder}")
    parts.train()
    assert not any(module.training for part in (parts.encoder, parts.llm) for module in part.modules())
    batch = one_batch(parts, cfg)
    assert torch.equal(parts(*batch)[0], parts(*batch)[0])  # this twin drops half its layers in training mode


@torch.no_grad()
@pytest.mark.parametrize("adaptor", ["linear", "stack"])
def test_the_loss_of_a_batch_is_the_sum_of_its_clips(world, encoder, adaptor):
    parts, cfg = parts_of(world, f"adaptor={adaptor}", "whisper_encoder.model_path=",
                          f"conformer_encoder.model_path={encoder.identity['name']}")
    feats, lens, rows = one_batch(parts, cfg, 5)
    assert len(set(lens.tolist())) > 1
    together = parts(feats, lens, rows)[0]
    alone = sum(parts(feats[i : i + 1, : int(lens[i])], lens[i : i + 1], rows[i : i + 1])[0] for i in range(5))
    assert float(together) == pytest.approx(float(alone), rel=1e-5)


def test_labels_are_the_text_and_the_end_token(world):
    parts, cfg = parts_of(world)
    feats, lens, rows = one_batch(parts, cfg)
    spliced = parts.listen(feats, lens, rows, [[*row["ids"], parts.stop_id] for row in rows])
    for row, labels in zip(rows, spliced["labels"]):
        said = parts.tokenizer.decode(labels[labels != model.IGNORE])
        assert said == f" {row['reference']}{parts.tokenizer.eos_token}"


def test_each_group_moves_at_its_own_rate_after_one_step(world, tmp_path):
    call(*world.arguments, f"training.output_dir={tmp_path}", "max_steps=1", "training.warmup_steps=0",
         "training.weight_decay=0", "training.learning_rate=3e-4", "training.steering_learning_rate=2e-2",
         "training.router_learning_rate=5e-3")
    start = parts_of(world)[0].trained.state_dict()
    moved = {name: float((value - start[name]).abs().max()) for name, value in trained_weights(tmp_path).items()}
    expected = {"steering.vectors": 2e-2, "steering.router": 5e-3, "steering.router_bias": 5e-3,
                "steering.scales": 5e-3, "bridge.weight": 3e-4, "bridge.bias": 3e-4}
    assert moved == pytest.approx(expected, rel=0.02)  # Adam's first step is the learning rate, whatever the gradient


def test_groups_decay_and_rates():
    trained = model.SteerMoE(Stub(3, 16), 48, SETTINGS)
    cfg = train_steermoe.DEFAULTS | {"training.warmup_steps": 10}
    optimizer = train_steermoe.make_optimizer(trained, cfg, torch.device("cpu"))
    names = {id(p): name for name, p in trained.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {name for name, value in decay.items() if value} == {"steering.router", "bridge.weight"}
    assert decay.keys() == dict(trained.named_parameters()).keys()
    half = train_steermoe.set_learning_rates(optimizer, 4, 100, cfg)
    full = train_steermoe.set_learning_rates(optimizer, 9, 100, cfg)
    assert full == pytest.approx({"steering": 1e-2, "router": 1e-3, "projection": 1e-4})
    assert half == pytest.approx({name: rate / 2 for name, rate in full.items()})
    assert all(rate < 1e-5 for rate in train_steermoe.set_learning_rates(optimizer, 99, 100, cfg).values())


def gradient_norms(folder):
    """Norms of the gradients that Adam saw in the first step: its first moment is a tenth of them."""
    state = newest(folder)
    moments = [entry["exp_avg"] * 10 for _, entry in sorted(state["optimizer"]["state"].items())]
    groups = {}
    for group in state["optimizer"]["param_groups"]:
        groups.setdefault(group["name"], []).extend(moments[i] for i in group["params"])
    norm = {name: math.sqrt(sum(float(x.pow(2).sum()) for x in group)) for name, group in groups.items()}
    return math.hypot(norm.get("steering", 0), norm.get("router", 0)), norm["projection"]


def test_clipping_comes_before_the_step(world, tmp_path):
    def norms(name, *extra):
        call(*world.arguments, f"training.output_dir={tmp_path / name}", "max_steps=1", *extra)
        return gradient_norms(tmp_path / name)

    free = norms("free", "clip_steering_gradients=false", "training.gradient_clipping=0")
    steered = norms("steered", "steering.steering_gradient_clip=1e-3", "training.gradient_clipping=0")
    both = norms("both", "steering.steering_gradient_clip=1e-3", "training.gradient_clipping=1e-2")
    off = norms("off", "steering.steering_gradient_clip=1e-3", "training.gradient_clipping=0",
                "steering.use_gradient_clipping=false")
    assert free[0] > 1e-2 and free[1] > 1e-1 and off == pytest.approx(free)
    assert steered == pytest.approx((1e-3, free[1]), rel=1e-3)
    assert math.hypot(*both) == pytest.approx(1e-2, rel=1e-3) and both[0] < 1e-3


def test_the_linear_ablation_changes_the_steering_and_nothing_else(world, tmp_path):
    steered, cfg = parts_of(world)
    linear, _ = parts_of(world, "steering=null")
    assert linear.trained.steering is None and "trained.bridge.weight" in linear.state_dict()
    assert all(torch.equal(value, steered.trained.state_dict()[name])
               for name, value in linear.trained.state_dict().items())
    steered.trained.steering.vectors.data.zero_()
    batch = one_batch(steered, cfg)
    assert torch.equal(steered(*batch)[0], linear(*batch)[0])
    yaml_file = tmp_path / "linear.yaml"
    yaml_file.write_text("steering: null\n", encoding="utf-8")
    call(*world.arguments, yaml_file, f"training.output_dir={tmp_path / 'run'}", "max_steps=1")
    assert set(trained_weights(tmp_path / "run")) == {"bridge.weight", "bridge.bias"}
    assert not (tmp_path / "run" / "steering.jsonl").exists()


def test_scales_stay_where_use_layer_scales_is_off(world, tmp_path):
    call(*world.arguments, f"training.output_dir={tmp_path}", "steering.use_layer_scales=false",
         "steering.steering_scale=0.25")
    assert trained_weights(tmp_path)["steering.scales"].tolist() == [0.25, 0.25]


def test_an_llm_as_wide_as_the_encoder_needs_no_adapter(world, tmp_path):
    whisper = make_twins.whisper_folder(tmp_path / "wide", width=48)
    call(*world.arguments, f"training.output_dir={tmp_path / 'run'}", f"whisper_encoder.model_path={whisper}",
         "use_adapter=false", "max_steps=1")
    assert all(name.startswith("steering.") for name in trained_weights(tmp_path / "run"))
    with pytest.raises(ValueError, match="nothing trains"):
        call(*world.arguments, f"training.output_dir={tmp_path / 'no'}", f"whisper_encoder.model_path={whisper}",
             "use_adapter=false", "steering=null")


def test_gradient_checkpointing_computes_layers_twice_to_the_same_gradients(world):
    gradients, calls = [], []
    for flag in ("false", "true"):
        parts, cfg = parts_of(world, f"training.gradient_checkpointing={flag}")
        counted = []
        for layer in (*parts.encoder.net.layers, *parts.llm.model.layers):
            first = next(layer.children())
            first.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        parts(*one_batch(parts, cfg))[0].backward()
        gradients.append({name: p.grad for name, p in parts.trained.named_parameters()})
        calls.append(len(counted))
    # 2 encoder and 2 LLM layers. Plain: the LLM's once for the shared prompt, once for the rest. Checkpointed: all once
    # more for the gradients, but for the encoder's first, before which nothing trains.
    assert calls == [6, 7]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


# ---- precision and DeepSpeed ------------------------------------------------------------------------------------


def test_fp16_becomes_bf16_for_qwen_and_says_so(world, tmp_path, capsys):
    assert train_steermoe.precision(settings_of(world)) == torch.float32
    assert train_steermoe.precision(settings_of(world, "training.fp16=true")) == torch.bfloat16
    assert "bf16 is used instead, Qwen overflows in fp16" in capsys.readouterr().out
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    cfg = settings_of(world, "training.fp16=true", f"llm_decoder.model_name={tmp_path}")
    assert train_steermoe.precision(cfg) == torch.float16


def test_half_precision_keeps_the_trained_weights_in_fp32(world, tmp_path):
    call(*world.arguments, f"training.output_dir={tmp_path}", "training.fp16=true", "max_steps=2")
    assert {value.dtype for value in trained_weights(tmp_path).values()} == {torch.float32}
    assert all(math.isfinite(row["ce"]) for row in lines(tmp_path / "metrics.jsonl"))


def test_without_the_package_or_its_launcher_ddp_is_named(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    call(*world.arguments, f"training.output_dir={tmp_path / 'a'}", "training.use_deepspeed=true", "max_steps=1")
    assert "deepspeed package is not installed; DDP is used" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    call(*world.arguments, f"training.output_dir={tmp_path / 'b'}", "training.use_deepspeed=true", "max_steps=1")
    assert "not started by the deepspeed launcher; DDP is used" in capsys.readouterr().out


class Engine:
    """A stand-in for DeepSpeed's engine on one process, with plain PyTorch inside."""

    def __init__(self, module, optimizer):
        self.module, self.optimizer = module, optimizer

    def __call__(self, *inputs):
        return self.module(*inputs)

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self):
        return 1.0

    def save_checkpoint(self, folder, tag, exclude_frozen_parameters):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / tag).write_text(str(exclude_frozen_parameters))


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_under_its_launcher_deepspeed_gets_the_json_and_the_yaml(world, tmp_path, monkeypatch, stage):
    import contextlib

    given, given_parameters = {}, []

    def initialize(model, optimizer, config):
        given.update(config)
        given_parameters.extend(name for name, _ in model.named_parameters())
        return Engine(model, optimizer), optimizer, None, None

    fake = types.ModuleType("deepspeed")
    fake.initialize = initialize
    fake.zero = types.SimpleNamespace(GatheredParameters=contextlib.nullcontext)
    monkeypatch.setitem(sys.modules, "deepspeed", fake)
    call("--local_rank=0", *world.arguments, f"training.output_dir={tmp_path}", "training.use_deepspeed=true",
         "training.gradient_clipping=0.7", "--deepspeed_config", ROOT / f"configs/deepspeed/{stage}.json")
    assert given["zero_optimization"]["stage"] == int(stage[-1])
    assert (given["train_micro_batch_size_per_gpu"], given["gradient_clipping"]) == (4, 0.7)
    assert not any(name.startswith("encoder.") for name in given_parameters)
    assert (tmp_path / "deepspeed" / "step4").read_text() == "True"
    start = parts_of(world)[0].trained.state_dict()
    assert not torch.equal(trained_weights(tmp_path)["bridge.weight"], start["bridge.weight"])


# ---- the run ----------------------------------------------------------------------------------------------------


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_killed_run_resumes_to_the_same_bits(world, tmp_path, monkeypatch):
    arguments = [*world.arguments, f"eval_dirs={world.manifest}", "eval_steps=2", "max_steps=8"]
    call(*arguments, f"training.output_dir={tmp_path / 'whole'}")
    real, steps = train_steermoe.clip_gradients, []

    def die_in_the_sixth_step(*rest, **named):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return real(*rest, **named)

    monkeypatch.setattr(train_steermoe, "clip_gradients", die_in_the_sixth_step)
    with pytest.raises(KeyboardInterrupt):
        call(*arguments, f"training.output_dir={tmp_path / 'killed'}", "resume=true")
    monkeypatch.setattr(train_steermoe, "clip_gradients", real)
    call(*arguments, f"training.output_dir={tmp_path / 'killed'}", "resume=true")
    whole, killed = newest(tmp_path / "whole"), newest(tmp_path / "killed")
    assert_equal(whole["trained"], killed["trained"])
    for index, entry in whole["optimizer"]["state"].items():
        assert_equal(entry, killed["optimizer"]["state"][index])
    assert all(whole[key] == killed[key] for key in ("step", "epoch", "used", "best", "stale"))
    assert_equal(trained_weights(tmp_path / "whole"), trained_weights(tmp_path / "killed"))
    for name in ("metrics.jsonl", "steering.jsonl"):
        steps = [[row["step"] for row in lines(tmp_path / run / name)] for run in ("whole", "killed")]
        assert steps[0] == steps[1]


def test_two_processes_equal_one_with_the_doubled_batch(world, tmp_path):
    shared = [*world.arguments, f"eval_dirs={world.manifest}"]
    call(*shared, "training.batch_size=6", f"training.output_dir={tmp_path / 'one'}")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
               str(20000 + os.getpid() % 20000), ROOT / "train_steermoe.py", *shared, "training.batch_size=3",
               f"training.output_dir={tmp_path / 'two'}"]
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = trained_weights(tmp_path / "one"), trained_weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-5, rtol=1e-4, msg=name)
    scores = [lines(tmp_path / name / "metrics.jsonl")[-1] for name in ("one", "two")]
    assert scores[0]["eval_ce"] == pytest.approx(scores[1]["eval_ce"], rel=1e-4)
    assert scores[0]["wer"] == scores[1]["wer"]


def test_the_loss_falls_and_the_saved_file_holds_only_what_trains(world, tmp_path):
    call(*world.arguments, f"training.output_dir={tmp_path}", "max_steps=100", "training.batch_size=12",
         "save_steps=100", "training.learning_rate=1e-2", "logging_steps=10", "log_steering_analysis=false")
    rows = [row for row in lines(tmp_path / "metrics.jsonl") if "ce" in row]
    assert rows[-1]["ce"] < 0.6 * rows[0]["ce"] and rows[-1]["acc"] > rows[0]["acc"]
    assert set(trained_weights(tmp_path)) == set(newest(tmp_path)["trained"]) == {
        "steering.vectors", "steering.router", "steering.router_bias", "steering.scales", "bridge.weight",
        "bridge.bias"}
    assert not (tmp_path / "plots").exists() and not (tmp_path / "steering.jsonl").exists()


def test_learning_rates_warm_up_in_the_log(world, tmp_path):
    call(*world.arguments, f"training.output_dir={tmp_path}", "logging_steps=1", "training.warmup_steps=4")
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["lr_steering"] for row in rows] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2])
    assert [row["lr_projection"] for row in rows] == pytest.approx([2.5e-5, 5e-5, 7.5e-5, 1e-4])


def test_early_stopping_watches_the_dev_error_rate(world, tmp_path, capsys):
    still = ["training.learning_rate=0", "training.steering_learning_rate=0", "training.router_learning_rate=0"]
    arguments = [*world.arguments, f"training.output_dir={tmp_path}", f"eval_dirs={world.manifest}", "eval_steps=1",
                 "max_steps=9", "use_early_stopping=true", "early_stopping_patience=2", *still]
    call(*arguments)
    evaluated = [row["step"] for row in lines(tmp_path / "metrics.jsonl") if "error_rate" in row]
    assert evaluated == [1, 2, 3]  # the first is the best, two are no better
    assert "stopping early at step 3" in capsys.readouterr().out
    call(*arguments, "resume=true")
    assert newest(tmp_path)["step"] == 3


def test_only_the_newest_checkpoints_are_kept(world, tmp_path):
    arguments = [*world.arguments, "save_steps=1"]
    call(*arguments, f"training.output_dir={tmp_path / 'two'}", "max_steps=6", "save_total_limit=2")
    assert [path.name for path in train_steermoe.checkpoints(tmp_path / "two")] == [
        "checkpoint-0000005.pt", "checkpoint-0000006.pt"]
    call(*arguments, f"training.output_dir={tmp_path / 'all'}", "max_steps=3", "save_total_limit=0")
    assert len(train_steermoe.checkpoints(tmp_path / "all")) == 3


def test_a_used_folder_and_a_strange_checkpoint_are_refused(world, tmp_path):
    arguments = [*world.arguments, f"training.output_dir={tmp_path}", "max_steps=1"]
    call(*arguments, f"training.logging_dir={tmp_path / 'board'}")
    assert list((tmp_path / "board").glob("events*")) and not list(tmp_path.glob("events*"))
    with pytest.raises(ValueError, match="already holds a run"):
        call(*arguments)
    with pytest.raises(ValueError, match="checkpoint-0000001.pt: was trained with 2 layers, 4 experts, width 32; this "
                                         "configuration has 2 layers, 3 experts, width 32"):
        call(*arguments, "resume=true", "steering.num_experts=3")
    last = train_steermoe.checkpoints(tmp_path)[-1]
    torch.save(torch.load(last, weights_only=True) | {"format": 1}, last)
    with pytest.raises(ValueError, match="of an earlier version"):
        call(*arguments, "resume=true")
    last.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="not a checkpoint of this script"):
        call(*arguments, "resume=true")


def test_epochs_decide_the_steps_where_max_steps_does_not(world, tmp_path):
    call(*world.arguments, f"training.output_dir={tmp_path}", "max_steps=0", "training.epochs=2")
    assert newest(tmp_path)["step"] == 6  # 12 clips in batches of 4


# ---- data -------------------------------------------------------------------------------------------------------


def audio_columns(world):
    """The same clips in every form that a column of audio has: {name: (values, type)}."""
    files = [str(world.manifest.parent / row["source"]) for row in world.rows[:3]]
    waves = [soundfile.read(file, dtype="float32")[0] for file in files]
    raw = [Path(file).read_bytes() for file in files]
    arrays = pa.struct([("array", pa.list_(pa.float32())), ("sampling_rate", pa.int64())])
    pcm = pa.struct([("array", pa.list_(pa.int16())), ("sampling_rate", pa.int64())])
    return {
        "bytes": (raw, pa.binary()),
        "struct": ([{"bytes": b, "path": "x.wav"} for b in raw],
                   pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "struct_path": ([{"bytes": None, "path": f} for f in files],
                        pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "path": (files, pa.string()),
        "array": ([{"array": w, "sampling_rate": 16000} for w in waves], arrays),
        "int16": ([{"array": np.round(w * 32768).astype(np.int16), "sampling_rate": 16000} for w in waves], pcm),
    }


def make_table(world, form="bytes", **extra):
    values, kind = audio_columns(world)[form]
    texts = [row["target"] for row in world.rows[:3]]
    return pa.table({"audio": pa.array(values, kind), "text": texts} | extra)


@pytest.mark.parametrize("form", ["bytes", "struct", "struct_path", "path", "array", "int16"])
@pytest.mark.parametrize("layout", ["parquet", "save_to_disk"])
def test_every_form_of_audio_gives_the_same_clips(world, tmp_path, form, layout):
    folder = tmp_path / "data" / "batch_0_0"
    folder.mkdir(parents=True)
    table = make_table(world, form)
    if layout == "parquet":
        pq.write_table(table, folder / "train-00000.parquet", row_group_size=2)
    else:  # as Dataset.save_to_disk writes it
        with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
            writer.write_table(table)
        (folder / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    cfg = settings_of(world, f"training.output_dir={tmp_path / 'run'}")
    rows = train_steermoe.read_rows([tmp_path / "data"], cfg)
    assert [row["target"] for row in rows] == [row["target"] for row in world.rows[:3]]
    for row, original in zip(rows, world.rows):
        expected = model.load_audio(world.manifest.parent / original["source"], 16000)
        assert train_steermoe.seconds_of(row) == pytest.approx(len(expected) / 16000)
        torch.testing.assert_close(train_steermoe.read_wave(row, 16000), expected, atol=1e-4, rtol=0)


def test_parquet_is_copied_once_and_trains_like_the_manifest(world, tmp_path):
    (tmp_path / "data").mkdir()
    texts = [row["target"] for row in world.rows]
    raw = [(world.manifest.parent / row["source"]).read_bytes() for row in world.rows]
    pq.write_table(pa.table({"audio": raw, "text": texts}), tmp_path / "data" / "a.parquet")
    rest = [a for a in world.arguments if not a.startswith("parquet_dirs")]
    call(*rest, f"parquet_dirs={tmp_path / 'data'}", f"training.output_dir={tmp_path / 'run'}")
    call(*world.arguments, f"training.output_dir={tmp_path / 'plain'}")
    assert_equal(trained_weights(tmp_path / "run"), trained_weights(tmp_path / "plain"))
    copy, = (tmp_path / "run" / "arrow").iterdir()
    before = copy.stat().st_mtime_ns
    train_steermoe.read_rows([tmp_path / "data"], settings_of(world, f"training.output_dir={tmp_path / 'run'}"))
    assert copy.stat().st_mtime_ns == before


def refused(world, tmp_path, message, *arguments, table=None):
    if table is not None:
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "data" / "train.parquet")
        arguments = [*arguments, f"parquet_dirs={tmp_path / 'data'}"]
    with pytest.raises(ValueError, match=message):
        call(*world.arguments, f"training.output_dir={tmp_path / 'run'}", *arguments)


def test_parquet_without_the_column_is_refused_with_those_it_has(world, tmp_path):
    refused(world, tmp_path, "has no column 'audio'; it has speech, text", table=make_table(world).rename_columns(
        ["speech", "text"]))
    refused(world, tmp_path, "has no column 'transcript'; it has audio, text", "text_column=transcript",
            table=make_table(world))


@pytest.mark.parametrize("values", [[1, 2, 3], [[0.1], [0.2], [0.3]], [{"array": [0.1]}] * 3])
def test_an_audio_column_of_another_type_is_refused_with_it(world, tmp_path, values):
    table = pa.table({"audio": values, "text": ["a", "b", "c"]})
    refused(world, tmp_path, "column 'audio' is of type .* expected audio: bytes", table=table)


def test_a_text_column_of_another_type_is_refused(world, tmp_path):
    table = make_table(world).set_column(1, "text", pa.array([1, 2, 3]))
    refused(world, tmp_path, "column 'text' is of type int64, expected text", table=table)


def test_damaged_and_empty_folders_are_named(world, tmp_path):
    (tmp_path / "data").mkdir()
    refused(world, tmp_path, "data: holds no .parquet and no .arrow file", f"parquet_dirs={tmp_path / 'data'}")
    (tmp_path / "data" / "x.parquet").write_bytes(b"PAR1 torn")
    refused(world, tmp_path, "x.parquet: not readable as Parquet", f"parquet_dirs={tmp_path / 'data'}")
    (tmp_path / "data" / "x.parquet").unlink()
    (tmp_path / "data" / "y.arrow").write_bytes(b"torn")
    refused(world, tmp_path, "y.arrow: not readable as Arrow", f"parquet_dirs={tmp_path / 'data'}")
    refused(world, tmp_path, "nowhere: no such manifest", f"parquet_dirs={tmp_path / 'nowhere'}")


@pytest.mark.parametrize(("message", "arguments"), [
    ("whisper_encoder.feature_dim=1280, but .* has 32", ["whisper_encoder.feature_dim=1280"]),
    ("whisper_encoder.num_layers=32, but .* has 2", ["whisper_encoder.num_layers=32"]),
    ("sample_rate=8000, but the encoder takes 16000 Hz", ["sample_rate=8000"]),
    ("give one of whisper_encoder.model_path and conformer_encoder.model_path", ["conformer_encoder.model_path=x"]),
    ("parquet_dirs: give at least one", ["parquet_dirs=[]"]),
    ("eval_dirs, which is empty", ["use_early_stopping=true"]),
    ("mode: expected one of train, test", ["mode=eval"]),
    ("has no question, which task=qa needs", ["task=qa"]),
    ("unknown key 'steering.steering_learning_rate'; did you mean 'training.steering_learning_rate'",
     ["steering.steering_learning_rate=5e-3"]),
    ("unknown key 'pooling_size'", ["pooling_size=4"]),
    ("no usable utterance; the first was left out: .* is over max_audio_length=0.1", ["max_audio_length=0.1"]),
])
def test_what_cannot_be_is_refused_by_name(world, tmp_path, message, arguments):
    refused(world, tmp_path, message, *arguments)


def bad_folder(world, folder):
    """Good clips and, in the same Parquet file, one for each way to be bad."""
    folder.mkdir()
    def wav(seconds, subtype=None):
        file = io.BytesIO()
        soundfile.write(file, np.full(round(16000 * seconds), 0.01, np.float32), 16000, format="WAV", subtype=subtype)
        return file.getvalue()
    good = [(world.manifest.parent / row["source"]).read_bytes() for row in world.rows[:4]]
    cells = [*good, wav(33), wav(0.02), b"", b"not audio", None, good[0][: len(good[0]) // 2], good[0]]
    texts = ["one"] * 10 + ["..."]
    pq.write_table(pa.table({"audio": pa.array(cells, pa.binary()), "text": texts}), folder / "x.parquet")
    return folder


@pytest.mark.parametrize("filtered", ["true", "false"])
def test_bad_clips_are_counted_and_never_end_the_run(world, tmp_path, filtered, capsys):
    folder = bad_folder(world, tmp_path / "data")
    call(*world.arguments, f"training.output_dir={tmp_path / 'run'}", f"parquet_dirs={folder}", "max_steps=6",
         f"filter_dataset={filtered}")
    named = {int(row["key"].split("/")[-1]): row["reason"] for row in lines(tmp_path / "run" / "bad.jsonl")}
    assert set(named) == {4, 5, 6, 7, 8, 9, 10}
    assert ("is over max_audio_length" if filtered == "true" else "longer than Whisper's 30 s") in named[4]
    assert "empty text" in named[10] and "truncated" in named[9]
    assert "left out (bad.jsonl)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cannot be read, more than max_bad=0"):
        call(*world.arguments, f"training.output_dir={tmp_path / 'no'}", f"parquet_dirs={folder}", "max_bad=0")


def test_long_texts_and_long_sequences_are_filtered(world):
    parts, cfg = parts_of(world)
    everything, _ = train_steermoe.list_utterances(cfg["parquet_dirs"], cfg, parts, filtered=True)
    middle = sorted(len(row["ids"]) for row in everything)[6]
    kept, left = train_steermoe.list_utterances(
        cfg["parquet_dirs"], cfg | {"max_text_length": middle}, parts, filtered=True)
    assert {len(row["ids"]) <= middle for row in kept} == {True} and len(kept) + len(left) == 12 and left
    middle = sorted(row["positions"] for row in everything)[6]
    kept, left = train_steermoe.list_utterances(
        cfg["parquet_dirs"], cfg | {"llm_decoder.max_length": middle}, parts, filtered=True)
    assert max(row["positions"] for row in kept) == middle and "over llm_decoder.max_length" in left[0]["reason"]
    kept, _ = train_steermoe.list_utterances(
        cfg["parquet_dirs"], cfg | {"max_text_length": 1, "filter_dataset": False}, parts, filtered=True)
    assert len(kept) == 12


def test_counted_positions_are_those_that_the_llm_gets(world, encoder):
    for extra in (["pooling_kernel_size=4"], ["adaptor=stack", "pooling_kernel_size=1"], ["max_prompt_tokens=3"]):
        parts, cfg = parts_of(world, "whisper_encoder.model_path=", *extra,
                              f"conformer_encoder.model_path={encoder.identity['name']}")
        feats, lens, rows = one_batch(parts, cfg)
        spliced = parts.listen(feats, lens, rows, [[*row["ids"], parts.stop_id] for row in rows])
        assert spliced["attention_mask"].sum(1).tolist() == [row["positions"] for row in rows]


# ---- evaluation -------------------------------------------------------------------------------------------------


def test_scores_by_hand_and_qa_is_exact_never_a_substring():
    rows = [{"reference": "Press one.", "text": "press one"}, {"reference": "hold on", "text": "hold"}]
    scores = train_steermoe.text_scores(rows, "asr")
    assert scores["wer_raw"] == 3 / 4 and scores["wer"] == scores["error_rate"] == 1 / 4
    assert scores["cer"] == 2 / 14 and scores["cer_raw"] == 4 / 15
    assert train_steermoe.text_scores([{"reference": "今天", "text": "今"}], "asr")["error_rate"] == 1 / 2
    rows = [{"reference": "Yes", "text": "yes!"}, {"reference": "yes", "text": "yes it is"},
            {"reference": "two dogs", "text": "dogs"}]
    scores = train_steermoe.text_scores(rows, "qa")
    assert scores["exact_match"] == 1 / 3 and scores["error_rate"] == pytest.approx(2 / 3)


def test_the_whole_test_set_is_scored_and_infer_says_the_same(world, tmp_path):
    run = tmp_path / "run"
    call(*world.arguments, f"training.output_dir={run}", "max_steps=30", "training.learning_rate=1e-2",
         "textual_prompt=Transcribe the speech:", "training.batch_size=12")
    rows = [row | {"source": str(world.manifest.parent / row["source"])} for row in world.rows]
    rows.append({"key": "gone", "source": "gone.wav", "target": "one two"})
    manifest = tmp_path / "test.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    test = [*world.arguments, f"training.output_dir={run}", "mode=test", f"parquet_dirs={manifest}",
            "textual_prompt=Transcribe the speech:"]
    summary = call(*test, "max_text_length=1")  # limits of training never shrink a test set
    assert (summary["n"], summary["n_left_out"]) == (13, 1)
    summary = call(*test)
    written = {row["key"]: row for row in lines(run / "test.jsonl")}
    assert len(written) == 13 and written["gone"]["text"] == "" and "no such file" in written["gone"]["reason"]
    references, texts = zip(*((row["target"], written[row["key"]]["text"]) for row in rows))
    assert summary["wer"] == model.error_rate(references, texts)["rate"] == json.loads(
        (run / "test.json").read_text())["wer"]
    slow = call(*test, "llm_decoder.use_cache=false")
    assert slow == summary and {row["key"]: row for row in lines(run / "test.jsonl")} == written
    arguments = infer.split_arguments([f"model.dir={run}", str(world.manifest), "workers=0", "device=cpu"])
    heard = infer.main(infer.load_config(arguments, infer.DEFAULTS))
    assert {row["key"]: row["text"] for row in heard["results"]} == {
        key: row["text"] for key, row in written.items() if key != "gone"}
    with pytest.raises(ValueError, match="was trained otherwise: textual_prompt 'Say it:' .trained with 'Transcribe"):
        call(*test, "textual_prompt=Say it:")
    with pytest.raises(ValueError, match="was trained with 2 layers, 4 experts, width 32; .* 2 layers, 5 experts"):
        call(*test, "steering.num_experts=5")


@pytest.mark.parametrize(("kind", "extra"), [
    ("parakeet", ["adaptor=stack", "stack_frames=2", "pooling_kernel_size=1"]),
    ("sensevoice", ["pooling_kernel_size=2"]),
    ("whisper", ["pooling_position=1", "pooling_type=max"]), ("whisper", ["steering=null", "pad_to_30s=true"])])
def test_infer_reads_every_kind_of_run(world, tmp_path, request, kind, extra):
    folder = request.getfixturevalue(f"{kind}_folder")
    arguments = [*world.arguments, "whisper_encoder.model_path=", f"conformer_encoder.model_path={folder}", *extra,
                 f"training.output_dir={tmp_path}"]
    call(*arguments, "max_steps=2", "training.learning_rate=1e-2")
    call(*arguments, "mode=test")
    written = {row["key"]: row["text"] for row in lines(tmp_path / "test.jsonl")}
    heard = infer.main(infer.load_config(infer.split_arguments(
        [f"model.dir={tmp_path}", str(world.manifest), "workers=0", "device=cpu"]), infer.DEFAULTS))
    assert {row["key"]: row["text"] for row in heard["results"]} == written


def test_questions_stand_in_the_prompt(world, tmp_path):
    rows = [row | {"source": str(world.manifest.parent / row["source"]), "question": f"which word is number {n}?"}
            for n, row in enumerate(world.rows)]
    manifest = tmp_path / "qa.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    arguments = ["task=qa", f"parquet_dirs={manifest}", "textual_prompt=Please answer: "]
    parts, cfg = parts_of(world, *arguments)
    train, _ = train_steermoe.list_utterances(cfg["parquet_dirs"], cfg, parts, filtered=True)
    for row in train:
        assert parts.tokenizer.decode(row["prompts"][0]).endswith(f"Please answer: {row['question']}")
    call(*world.arguments, *arguments, f"training.output_dir={tmp_path / 'run'}", f"eval_dirs={manifest}",
         "max_steps=1")
    scores = lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert scores["error_rate"] == pytest.approx(1 - scores["exact_match"])


# ---- what the experts do ----------------------------------------------------------------------------------------


def test_gate_usage_counts_real_frames_only():
    gates = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], [[0.6, 0.4], [0.0, 1.0], [0.0, 1.0]]])
    usage = train_steermoe.GateUsage(1, 2)
    usage(0, gates, torch.tensor([[True, True, False], [True, False, False]]))
    steering = model.Steering(1, 2, 4)
    row, = usage.per_layer(steering)
    assert row["gates"] == pytest.approx([1.7 / 3, 1.3 / 3], abs=1e-5) and row["top"] == pytest.approx(2 / 3, abs=1e-5)
    entropy = -sum(p * math.log(p) for p in (0.9, 0.1, 0.2, 0.8, 0.6, 0.4)) / 3
    assert row["entropy"] == pytest.approx(entropy, abs=1e-5)
    assert row["norms"] == pytest.approx(steering.vectors[0].norm(dim=1).tolist(), abs=1e-5)


def test_steering_is_logged_and_drawn(world, tmp_path):
    rows = [row | {"source": str(world.manifest.parent / row["source"]), "condition": "clean" if n % 2 else "noisy"}
            for n, row in enumerate(world.rows)]
    manifest = tmp_path / "c.jsonl"
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    call(*world.arguments, f"parquet_dirs={manifest}", f"training.output_dir={tmp_path / 'run'}", "max_steps=5",
         "steering_log_interval=2")
    logged = lines(tmp_path / "run" / "steering.jsonl")
    assert [row["step"] for row in logged] == [2, 4, 5]
    for layer in (layer for row in logged for layer in row["layers"]):
        assert set(layer) == {"layer", "scale", "norms", "gates", "entropy", "top"}
        assert sum(layer["gates"]) == pytest.approx(1, abs=1e-4) and 0 < layer["entropy"] <= math.log(4) + 1e-5
        assert len(layer["norms"]) == 4 and 0.25 <= layer["top"] <= 1
    pictures = sorted(path.name for path in (tmp_path / "run" / "plots").iterdir())
    assert pictures == ["conditions.png", "experts.png", "gates_0.png", "gates_1.png", "gates_2.png"]


# ---- recipes ----------------------------------------------------------------------------------------------------


def test_the_guides_recipes_are_there():
    names = {path.stem for path in (ROOT / "configs" / "steermoe").glob("*.yaml") if not path.stem.startswith("demo")}
    assert names == {*TRAIN, *TEST}


def twin_arguments(world, name, run, parakeet_folder):
    """A recipe with tiny stand-ins in place of its models and data; everything else stays as shipped."""
    path = ROOT / "configs" / "steermoe" / f"{name}.yaml"
    kind = "conformer" if "conformer" in name else "whisper"
    folder, layers = (parakeet_folder, 3) if kind == "conformer" else (world.whisper, 2)
    rows = [row | {"source": str(world.manifest.parent / row["source"]), "question": "what is said?"}
            for row in world.rows[:5]]
    run.mkdir(exist_ok=True)
    (run / "m.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    sizes = found[f"{kind}_encoder"]
    assert sizes["feature_dim"] and found["pooling_position"] == sizes["num_layers"]
    dev = [f"eval_dirs={run / 'm.jsonl'}"] if found["mode"] == "train" else []
    return [path, f"{kind}_encoder.model_path={folder}", f"{kind}_encoder.feature_dim=32",
            f"{kind}_encoder.num_layers={layers}", f"llm_decoder.model_name={world.qwen3}",
            f"pooling_position={layers}", f"parquet_dirs={run / 'm.jsonl'}", *dev, f"training.output_dir={run / 'out'}",
            f"training.logging_dir={run / 'log'}", "dataloader_num_workers=0", "max_steps=2", "device=cpu"]


@pytest.mark.parametrize("name", TRAIN)
def test_every_training_recipe_runs_with_stand_ins(world, tmp_path, parakeet_folder, name):
    call(*twin_arguments(world, name, tmp_path, parakeet_folder))
    steered = any(key.startswith("steering.") for key in trained_weights(tmp_path / "out"))
    assert steered == name.startswith("layer_wise")
    scores = lines(tmp_path / "out" / "metrics.jsonl")[-1]
    assert ("exact_match" in scores) == ("clothoaqa" in name) and {"wer", "wer_raw", "cer", "cer_raw"} <= set(scores)
    test = name.replace("train", "test")
    if test in TEST:
        call(*twin_arguments(world, test, tmp_path, parakeet_folder))
        assert json.loads((tmp_path / "out" / "test.json").read_text())["n"] == 5


def test_linear_recipes_differ_from_layer_wise_in_the_steering_only():
    def recipe(name):
        tree = yaml.safe_load((ROOT / "configs" / "steermoe" / f"{name}.yaml").read_text(encoding="utf-8"))
        for key in ("output_dir", "logging_dir"):
            tree["training"].pop(key)
        return tree

    linear, steered = recipe("linear_whisper_qwen7b_libri_train"), recipe("layer_wise_whisper_qwen7b_libri_train")
    assert linear.pop("steering", "absent") is None and steered.pop("steering")["num_experts"] == 8
    assert linear == steered


def test_recipes_write_out_every_key_of_the_guide():
    guide = {key for key in train_steermoe.DEFAULTS if "." in key and "conformer" not in key} | {
        "parquet_dirs", "audio_column", "text_column", "sample_rate", "max_audio_length", "max_text_length",
        "filter_dataset", "textual_prompt", "max_prompt_tokens", "use_adapter", "save_total_limit", "logging_steps",
        "eval_steps", "save_steps", "log_steering_analysis", "steering_log_interval", "clip_steering_gradients",
        "use_early_stopping", "early_stopping_patience", "pooling_kernel_size", "pooling_position", "pooling_type"}
    tree = yaml.safe_load((ROOT / "configs/steermoe/layer_wise_whisper_qwen7b_libri_train.yaml").read_text())
    given = {f"{name}.{key}" for name, part in tree.items() if isinstance(part, dict) for key in part}
    assert guide - given - set(tree) == set() and len(guide) >= 45
