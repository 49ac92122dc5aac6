"""train_salm.py as its users meet it: keys, conversations, perception, losses, runs, infer.py."""

import copy
import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import make_twins
import numpy as np
import pytest
import torch
from processes import run_processes

import infer
import model
import train_salm as ts

PAGE = """
model:
  pretrained_llm: TinyLlama/TinyLlama_v1.1
  pretrained_asr: stt_en_fastconformer_hybrid_large_streaming_80ms
  freeze_params: ["^llm\\\\.model\\\\.layers\\\\.[0-4]\\\\..+$"]
  lora: {task_type: CAUSAL_LM, r: 8, lora_alpha: 32, lora_dropout: 0.1}
  perception:
    encoder: {self_attention_model: rel_pos, conv_context_size: regular}
    modality_adapter: {feat_in: 1024, d_model: 64, subsampling: dw_striding}
trainer: {accelerator: cpu, replace_sampler_ddp: false, max_epochs: null}
exp_manager: {name: "${name}", exp_dir: null, create_tensorboard_logger: false}
data:
  train_ds:
    sample_rate: ${data.target_sample_rate}
    input_cfg: [{type: lhotse_shar, shar_path: train}]
  validation_ds:
    datasets: {val_set_name: {shar_path: validation}}
    sample_rate: ${data.target_sample_rate}
"""  # what of the requested page's example cannot run
EVEN = "model.perception.modality_adapter.conv_norm_type=layer_norm model.lora.lora_dropout=0"


def config(*settings):
    """`settings` hold key=value pairs with spaces between."""
    arguments = " ".join(map(str, settings)).split()
    return model.load_config(arguments, ts.DEFAULTS, optional=("model.lora",))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def turn(role, value, kind="text", **more):
    return {"from": role, "type": kind, "value": str(value)} | more


def trained(folder):
    return torch.load(folder / "last.pt", weights_only=True)["trained"]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def world(tmp_path_factory, whisper_folder, qwen3_folder):
    """Eight clips, conversations of one, two and no recordings about them, settings of a run."""
    folder = tmp_path_factory.mktemp("salm")
    manifest = make_twins.wav_files(folder / "wavs", n=8)
    clips = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows = []
    for n, (a, b) in enumerate(zip(clips, clips[1:], strict=False)):
        heard = [turn("User", f"wavs/{c['source']}", "audio", text=c["target"]) for c in (a, b)]
        asked = [turn("User", "Both:"), *heard, turn("Assistant", f"{a['target']} {b['target']}")]
        rows.append({"id": f"pair{n}", "conversations": asked})
    said = [turn("User", "please hold"), turn("Assistant", "one")]
    rows.append({"id": "none", "conversations": said})
    both = write(folder / "both.jsonl", rows)
    run = f"""model.pretrained_llm={qwen3_folder} model.pretrained_asr={whisper_folder}
        data.train_ds.manifest_filepath={both} data.train_ds.batch_size=4 trainer.accelerator=cpu
        data.validation_ds.datasets.pairs.manifest_filepath={both} trainer.max_steps=4
        data.validation_ds.datasets.clips.manifest_filepath={manifest} trainer.val_check_interval=2
        trainer.log_every_n_steps=1 data.train_ds.num_workers=0 data.validation_ds.num_workers=0
        data.validation_ds.max_new_tokens=6 model.perception.modality_adapter.d_model=32
        model.perception.modality_adapter.subsampling_factor=4 model.lora.r=2 save_every=2
        model.lora.lora_dropout=0.1 model.optimizer.lr=2e-3 model.lr_scheduler.warmup_steps=2"""
    return SimpleNamespace(folder=folder, manifest=manifest, both=both, run=run, clips=clips)


def build(world, *settings):
    """SALM, its configuration, and its conversations as one Dataset."""
    cfg = config(world.run, *settings)
    salm = ts.build(cfg, torch.float32, torch.device("cpu"))
    rest = cfg, salm.tokenizer, salm.perception, {}, world.folder / "manifests"
    rows = ts.read_conversations(cfg.data.train_ds, *rest)
    return salm, cfg, ts.Conversations(rows, salm.perception.encoder, world.folder / "manifests")


def refused(message, world, *settings):
    with pytest.raises(model.UserError, match=message):
        ts.main(config(world.run, *settings))


# ---- configuration ----------------------------------------------------------


def test_the_pages_example_ends_in_refusals_that_can_be_mended(
    world, whisper_folder, tmp_path, capsys
):
    page = tmp_path / "page.yaml"
    page.write_text(PAGE)
    with pytest.raises(model.UserError) as caught:
        ts.check(config(page), print, True)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("7 settings") and len(lines) == 15
    for part in ("feat_in=1024: that encoder has 512", "conv_context_size=regular", "lhotse's",
                 "data.train_ds.sample_rate", "streaming_80ms: not in transformers"):  # fmt: skip
        assert sum(part in line for line in lines[1::2]), part
    mends = " ".join(lines[2::2]).replace("FILE", str(world.manifest)).split()
    llm = world.run.split()[0]
    asr = f"model.pretrained_asr={whisper_folder}"
    kind = "model.perception.encoder.self_attention_model=abs_pos"
    cfg = config(page, *mends, llm, asr, kind)
    ts.check(cfg, print, True)
    said = capsys.readouterr().out
    assert "note: trainer.replace_sampler_ddp=False changes nothing" in said
    assert "max_steps=100000 changes" not in said  # "-1: ..." is no mark
    salm = ts.build(cfg, torch.float32, torch.device("cpu"))
    frozen = [name for name, p in salm.named_parameters() if not p.requires_grad]
    assert frozen and all(name.startswith("llm.model.layers.") for name in frozen)


def test_the_forms_of_hydra_are_understood(world, tmp_path):
    (tmp_path / "a.yaml").write_text("name: one\nmodel: {pretrained_llm: x, pretrained_asr: y}\n")
    rest = ["--config-path", str(tmp_path), "--config-name=a", "+data.prompt=P"]
    cfg = model.load_config([*rest, "++save_every=3", "trainer.max_steps=7"], ts.DEFAULTS)
    assert (cfg.exp_manager.name, cfg.data.prompt, cfg.save_every) == ("one", "P", 3)
    assert cfg.model.lr_scheduler.max_steps == 7
    assert model.load_config([*rest, "~data.prompt"], ts.DEFAULTS).data.prompt == "Transcribe:"


@pytest.mark.parametrize(("setting", "message"), [
    ("model.freeze_params=^perception\\.adapter\\.layers", "nothing; nearest.*modality_adapter"),
    ("model.perception.modality_adapter.feat_in=99", "feat_in=99: here it has to be 32"),
    ("model.perception.encoder.self_attention_model=rel_pos", "has to be abs_pos"),
    ("model.perception.output_dim=7", "output_dim=7: here it has to be 48"),
    ("model.freeze_params=^.+$ model.lora.r=0", "nothing trains"),
    ("model.freeze_params=^perception\\..+$ loss.distill_weight=1", "LLM, which has to be frozen"),
    ("exp_manager.checkpoint_callback_params.monitor=val_bleu", "expected one of val_loss"),
    ("model.perception.speech=ctc", "needs an init_from with a CTC head"),
    ("exp_manager.resume_ignore_no_checkpoint=false", "last.pt: none"),
    ("trainer.devices=3", "this is 1 processes; use torchrun --nproc_per_node 3"),
    ("trainer.strategy=fsdp2", "start with torchrun"),
    ("trainer.precision=16-mixed", "fp16 overflows"),
    ("data.train_ds.batch_tokens=20 data.train_ds.max_dropped=3", "conversations cannot be used"),
    ("model.perception.modality_adapter._target_=x.QFormer", "QFormer is none of ConformerEncoder"),
])  # fmt: skip
def test_what_cannot_work_is_one_line(world, tmp_path, setting, message):
    refused(message, world, f"exp_manager.explicit_log_dir={tmp_path}/run", setting)


# ---- conversations ----------------------------------------------------------


def test_a_conversation_is_the_chat_templates_with_labels_on_the_answers(tokenizer):
    turns = [("system", "You are a helpful assistant."), ("user", "please press <a>"),
             ("assistant", " one "), ("user", "<a> or <a>"), ("assistant", "two <a>")]  # fmt: skip
    ids, labels = ts.render(tokenizer, turns, "<a>")
    messages = [{"role": role, "content": text.strip()} for role, text in turns]
    wanted = tokenizer.apply_chat_template(messages, tokenize=False)
    shown = "".join(tokenizer.decode([i]) if i >= 0 else "<a>" for i in ids)
    assert shown == wanted and ids.count(model.AUDIO) == 3  # the assistant's tag is text
    assert tokenizer.decode([x for x in labels if x >= 0]) == "one<|im_end|>two <a><|im_end|>"
    asked, _ = ts.render(tokenizer, turns[:-1], "<a>", answer=True)
    assert ids[: len(asked)] == asked and labels[len(asked)] == ids[len(asked)]
    _, headed = ts.render(tokenizer, turns, "<a>", mask_header=False)
    assert tokenizer.decode([x for x in headed if x >= 0]).startswith("<|im_start|>assistant\none")
    fake = [("user", "<|im_end|> \ue001 <a>"), ("assistant", "<|im_end|>one")]
    ids, _ = ts.render(tokenizer, fake, "<a>")
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2  # plain text stays text


def test_nemo_and_sharegpt_rows_become_the_same_conversation():
    heard = [turn("User", "a.wav", "audio", text="x", offset=1.5, duration=2.0)]
    heard.append(turn("user", "and"))
    nemo = {"conversations": [*heard, turn("User", "b.wav", "audio"), turn("Assistant", "yes")]}
    turns, audio = ts.json_turns(nemo, "<audio>", "in")
    assert turns == [("user", "<audio> and <audio>"), ("assistant", "yes")]
    assert [clip["source"] for clip in audio] == ["in/a.wav", "in/b.wav"]
    assert (audio[0]["start"], audio[0]["end"], audio[0]["text"]) == (1.5, 3.5, "x")
    said = [{"from": "human", "value": "<sound> and <speech>"}, {"from": "gpt", "value": "yes"}]
    share = {"sound": ["a.wav", "b.wav"], "conversations": said}
    assert ts.json_turns(share, "<audio>", "in")[0] == turns
    share["conversations"][0]["value"] = "hear <sound>"
    assert ts.json_turns(share, "<audio>", "")[0][0][1] == "hear <audio><audio>"
    share |= {"sound": "a.wav"}
    share["conversations"][0]["value"] = "<sound> <sound>"
    assert [clip["source"] for clip in ts.json_turns(share, "<audio>", "")[1]] == ["a.wav"] * 2


@pytest.mark.parametrize(("turns", "message"), [
    ([turn("User", "<audio>"), turn("Assistant", "x")], "bad.jsonl:1: 1 x <audio> for 0 recording"),
    ([turn("Robot", "x"), turn("Assistant", "x")], "bad.jsonl:1.*role 'Robot' is none of user"),
    ([turn("User", "x"), turn("Assistant", "a.wav", "audio")], "in a turn of the assistant"),
    ([turn("User", "x")], "bad.jsonl:1: ends with a turn of the user, no answer"),
    ([{"from": "User"}], "bad.jsonl:1: not a conversation .'value'"),
    ([], "bad.jsonl:1: not a conversation"),
])  # fmt: skip
def test_a_row_that_is_no_conversation_is_named(world, tmp_path, turns, message):
    bad = write(tmp_path / "bad.jsonl", [{"id": "x", "conversations": turns}])
    run = f"exp_manager.explicit_log_dir={tmp_path}/run data.train_ds.manifest_filepath={bad}"
    refused(message, world, run)


def test_recordings_that_cannot_be_heard_are_counted_and_not_learnt(world, tmp_path):
    (tmp_path / "torn.wav").write_bytes(b"RIFF")
    rows = [json.loads(line) for line in world.both.read_text().splitlines()]
    for row in rows:
        for part in (part for part in row["conversations"] if part["type"] == "audio"):
            part["value"] = str(world.folder / part["value"])
    rows[0]["conversations"][1]["value"] = str(tmp_path / "torn.wav")
    bad = write(tmp_path / "bad.jsonl", rows)
    run = f"exp_manager.explicit_log_dir={tmp_path}/run data.train_ds.manifest_filepath={bad}"
    ts.main(config(world.run, run, "trainer.max_steps=1"))
    left = [json.loads(x) for x in (tmp_path / "run/dropped.jsonl").read_text().splitlines()]
    assert [row["key"] for row in left] == ["pair0"] and "not readable" in left[0]["reason"]
    salm, cfg, data = build(world, run, "data.train_ds.max_dropped=9")
    batch = data[0, 0, [[0, 1]]]
    assert batch.rows[0]["n"] == 0 < batch.rows[1]["n"] and batch.counts()[0] == batch.rows[1]["n"]


# ---- perception -------------------------------------------------------------


@pytest.mark.parametrize("lens", [[7, 7], [7, 4]])
def test_conformer_layers_are_those_of_transformers(lens):
    from transformers import ParakeetEncoderConfig
    from transformers.models.parakeet.modeling_parakeet import (
        ParakeetEncoderBlock,
        ParakeetEncoderRelPositionalEncoding,
    )  # fmt: skip

    net = model.Conformer(12, n_layers=2, d_model=16, n_heads=4, xscaling=False)
    make_twins.randomise(net)
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4}
    own = ParakeetEncoderConfig(**sizes, intermediate_size=64, conv_kernel_size=9, dropout=0.0)
    theirs = torch.nn.ModuleList([ParakeetEncoderBlock(own, n) for n in range(2)])
    names = {"linear_q": "q_proj", "linear_k": "k_proj", "linear_v": "v_proj", "batch_norm": "norm",
             "linear_out": "o_proj", "linear_pos": "relative_k_proj",
             "pos_bias": "bias"}  # fmt: skip
    weights = {}
    for name, value in net.layers.state_dict().items():
        for ours, other in names.items():
            name = name.replace(ours, other)
        weights[name] = value
    theirs.load_state_dict(weights)
    x, lens = torch.randn(2, 7, 12), torch.tensor(lens)
    found, _ = net.eval()(x, lens)
    hidden = net.pre_encode["out"](x)
    real = model.length_mask(lens, 7)
    positions = ParakeetEncoderRelPositionalEncoding(own)(hidden)
    for block in theirs.eval():
        hidden = block(hidden, (real[:, None] & real[:, :, None])[:, None], positions)
    torch.testing.assert_close(found[real], hidden[real], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("settings", [
    {}, {"subsampling_factor": 4}, {"self_attention_model": "abs_pos", "feat_out": 6},
    {"conv_context_size": "causal", "conv_norm_type": "layer_norm", "att_context_size": [2, 0]},
    {"att_context_size": [4, 1], "att_context_style": "chunked_limited", "untie_biases": False},
])  # fmt: skip
def test_padding_never_reaches_what_the_conformer_hears(settings):
    net = make_twins.randomise(model.Conformer(5, d_model=16, n_heads=2, **settings)).eval()
    x, lens = torch.randn(3, 11, 5), torch.tensor([11, 6, 1])
    for row, n in enumerate(lens.tolist()):
        x[row, n:] = math.nan
    found, out_lens = net(x, lens)
    for row, n in enumerate(lens.tolist()):
        alone, (count,) = net(x[row : row + 1, :n], lens[row : row + 1])
        assert count == out_lens[row] == net.out_lens(torch.tensor(n))
        torch.testing.assert_close(found[row, :count], alone[0], atol=1e-5, rtol=1e-5)


def test_batch_norm_counts_real_frames_only():
    net = model.Conformer(5, n_layers=1, d_model=16, n_heads=2).train()
    norm, seen = net.layers[0].conv.batch_norm, []
    norm.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    net(torch.randn(2, 9, 5), torch.tensor([9, 3]))
    assert seen[0].shape == (12, 16)
    torch.testing.assert_close(norm.running_mean, 0.1 * seen[0].mean(0))


def test_a_causal_conformer_hears_nothing_ahead():
    causal = {"conv_context_size": "causal", "conv_norm_type": "layer_norm"}
    net = model.Conformer(5, d_model=16, n_heads=2, att_context_size=[-1, 0], **causal).eval()
    x, lens = torch.randn(1, 12, 5), torch.tensor([12])
    other = x.clone()
    other[:, 7:] += 1.0
    changed = (net(x, lens)[0] - net(other, lens)[0]).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False] * 7 + [True] * 5
    chunks = model.Conformer(
        5, d_model=16, n_heads=2, n_layers=4, att_context_size=[4, 1],
        att_context_style="chunked_limited", **causal,
    ).eval()  # fmt: skip
    changed = (chunks(x, lens)[0] - chunks(other, lens)[0]).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False] * 6 + [True] * 6  # one frame ahead in all, not in each layer


@pytest.mark.parametrize(("left", "right", "style"), [
    (-1, -1, "regular"), (3, 0, "regular"), (-1, 2, "regular"), (2, -1, "regular"),
    (4, 1, "chunked_limited"), (-1, 2, "chunked_limited"),
])  # fmt: skip
def test_attention_windows_by_hand(left, right, style):
    found = model.attention_window(9, left, right, style)
    for i in range(9):
        for j in range(9):
            if style == "regular":
                wanted = (left < 0 or i - j <= left) and (right < 0 or j - i <= right)
            else:
                chunk = i // (right + 1) - j // (right + 1)
                wanted = chunk >= 0 and (left < 0 or chunk <= left // (right + 1))
            assert found[i, j] == wanted, (i, j)


@pytest.mark.parametrize("kind", ["whisper", "parakeet", "sensevoice"])
def test_a_window_narrows_every_encoder_and_padding_still_does_not_matter(kind, request):
    folder = request.getfixturevalue(f"{kind}_folder")
    waves = [torch.randn(count) * 0.1 for count in (48000, 20000)]
    encoder = model.load_encoder(folder)
    for p in encoder.parameters():  # else attention hardly counts in the twins
        p.data.mul_(4.0 if kind == "parakeet" and p.ndim == 2 else 1.0)
    narrow, wide = copy.deepcopy(encoder), copy.deepcopy(encoder)
    model.set_attention_window(narrow, 2, 1)
    model.set_attention_window(wide, -1, -1)
    feats = [encoder.features(wave, "a") for wave in waves]
    lens = torch.tensor([len(x) for x in feats])
    batch = torch.nn.utils.rnn.pad_sequence(feats, batch_first=True)
    together, out_lens = narrow(batch, lens)
    real = model.length_mask(out_lens, together.shape[1])
    usual = encoder(batch, lens)[0]
    torch.testing.assert_close(wide(batch, lens)[0][real], usual[real], atol=1e-5, rtol=1e-5)
    alone, _ = narrow(feats[1][None], lens[1:])
    torch.testing.assert_close(together[1, : out_lens[1]], alone[0], atol=1e-4, rtol=1e-4)
    assert (together[0] - usual[0]).abs().max() > 1e-4
    changed = feats[0].clone()
    changed[: len(changed) // 8] += 1.0  # what lies beyond all layers' windows hears nothing of it
    other, _ = narrow(changed[None], lens[:1])
    torch.testing.assert_close(other[0, -3:], narrow(feats[0][None], lens[:1])[0][0, -3:])
    assert narrow.identity != encoder.identity


# ---- freezing, splice, losses -----------------------------------------------


def test_freezing_by_name_holds_under_lora_and_in_train(world):
    salm, _, _ = build(world)
    salm.train()
    names = {name for name, p in salm.named_parameters() if p.requires_grad}
    parts = ("lora_", "perception.modality_adapter.", "perception.proj.")
    assert names == {n for n, _ in salm.named_parameters() if any(part in n for part in parts)}
    assert not salm.llm.training and not salm.perception.encoder.training
    assert salm.perception.modality_adapter.training
    drops = [m for n, m in salm.llm.named_modules() if n.endswith("lora_dropout")]
    assert drops and all(m.training for m in drops)
    kept = "model.prevent_freeze_params=^llm\\.model\\.layers\\.0\\.mlp\\..+$"
    salm, _, _ = build(
        world, "model.freeze_params=^llm\\.layers\\.0\\..+$,^embed_tokens\\..+$", kept
    )
    frozen = {n for n, p in salm.named_parameters() if not p.requires_grad}
    assert "llm.model.embed_tokens.weight" in frozen and not any("mlp" in n for n in frozen)
    assert all(n.startswith(("llm.model.layers.0.", "llm.model.embed_tokens.")) for n in frozen)
    assert not any("lora_" in name for name in frozen)


def test_several_recordings_stand_in_their_places():
    embed, emb = torch.nn.Embedding(9, 4), torch.randn(3, 5, 4)
    lens, rows = torch.tensor([2, 5, 1]), [[1, -1, 2, -1], [3], [-1, 4, 5]]
    labels = [[-100, -100, 2, -100], [3], [-100, 4, 5]]
    words = functools.partial(lambda ids: embed(torch.tensor(ids)))
    wanted = [torch.cat([words([1]), emb[0, :2], words([2]), emb[1]]), words([3]),
              torch.cat([emb[2, :1], words([4, 5])])]  # fmt: skip
    for left in (False, True):
        found = model.splice_rows(embed, rows, emb, lens, labels, left)
        for row, part in enumerate(wanted):
            own = found.mask[row].bool()
            torch.testing.assert_close(found.embeds[row][own], part)
            kept = [x for x in found.labels[row].tolist() if x >= 0]
            assert kept == [x for x in labels[row] if x >= 0] and own.sum() == len(part)
            assert found.positions[row][own].tolist() == list(range(len(part)))
    with pytest.raises(ValueError, match="splice"):
        model.splice_rows(embed, [[1, -1]], emb, lens)


def test_distillation_by_its_formula_in_float64():
    torch.manual_seed(1)
    student, teacher = torch.randn(6, 30), 3 * torch.randn(6, 30)
    p, q = (x.double().log_softmax(-1) for x in (teacher, student))
    whole = (p.exp() * (p - q)).sum()
    found = ts.distill_loss(student, *teacher.log_softmax(-1).topk(30))
    torch.testing.assert_close(found.double(), whole, atol=1e-4, rtol=1e-5)
    log_probs, tokens = teacher.log_softmax(-1).topk(4)
    wanted = 0.0
    for n in range(6):
        top = tokens[n].tolist()
        others = [v for v in range(30) if v not in top]
        wanted += sum(p[n, v].exp() * (p[n, v] - q[n, v]) for v in top)
        mass = [float(x[n, others].exp().sum()) for x in (p, q)]
        wanted += mass[0] * (math.log(mass[0]) - math.log(mass[1]))
    found = ts.distill_loss(student, log_probs, tokens)
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-5)
    assert float(found) < float(whole)


def test_a_batch_costs_what_its_rows_cost_and_text_alone_teaches_nothing(world):
    salm, _, data = build(world, EVEN, "loss.distill_weight=1")
    salm.eval()
    with torch.no_grad():
        together = salm(*(lambda b: (b.feats, b))(data[0, 0, [[0, 1, 7]]]))
        singles = [salm(*(lambda b: (b.feats, b))(data[0, 0, [[n]]])) for n in (0, 1, 7)]
    for name in ("ce", "kl"):
        total = sum(s[name] for s in singles)
        torch.testing.assert_close(together[name], total, atol=1e-3, rtol=1e-4)
    assert together["right"] == sum(s["right"] for s in singles)
    assert abs(float(singles[2]["kl"])) < 1e-4 < float(singles[0]["kl"])  # it reads what it hears


def test_the_teacher_reads_the_texts_without_lora(world):
    salm, cfg, data = build(world, EVEN, "loss.distill_weight=1 loss.distill_top_k=5")
    for name, p in salm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    batch = data[0, 0, [[0]]]
    log_probs, tokens = salm.teach(batch)
    plain = model.load_llm(cfg.model.pretrained_llm)[0]
    texts = iter(world.clips[n]["target"] for n in (0, 1))
    ids, labels = batch.rows[0]["ids"], batch.rows[0]["labels"]
    encode = functools.partial(salm.tokenizer, add_special_tokens=False)
    read = [encode(next(texts))["input_ids"] if i < 0 else [i] for i in ids]
    before = np.cumsum([len(part) for part in read]) - 1
    logits = plain(torch.tensor([sum(read, [])])).logits[0].log_softmax(-1)
    places = [before[n] - 1 for n, label in enumerate(labels) if label >= 0]
    wanted, their = logits[places].topk(5)
    torch.testing.assert_close(log_probs, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(tokens, their)


# ---- runs -------------------------------------------------------------------


def test_a_run_learns_listens_and_goes_on_to_the_bit(world, tmp_path):
    rest = f"{world.run} loss.distill_weight=0.5"
    ts.main(config(rest, f"exp_manager.explicit_log_dir={tmp_path}/whole"))
    ts.main(config(rest, f"exp_manager.explicit_log_dir={tmp_path}/cut trainer.max_steps=2",
                   "model.lr_scheduler.max_steps=4"))  # fmt: skip
    first = trained(tmp_path / "cut")
    ts.main(config(rest, f"exp_manager.explicit_log_dir={tmp_path}/cut"))
    assert same(trained(tmp_path / "whole"), trained(tmp_path / "cut"))
    assert not same(first, trained(tmp_path / "cut"))
    rows = [json.loads(x) for x in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row}
    wanted = {f"val_{kind}{part}" for kind in ("loss", "acc", "wer", "exact", "kl", "agree")
              for part in ("", "_pairs", "_clips")}  # fmt: skip
    assert wanted | {"ce", "kl", "agree", "lr", "grad_norm"} <= names
    scores = rows[-1]
    mean = (scores["val_loss_pairs"] + scores["val_loss_clips"]) / 2
    assert scores["val_loss"] == pytest.approx(mean)
    control = json.loads((tmp_path / "whole/control.json").read_text())
    assert control["val_loss"] != scores["val_loss"] and wanted == control.keys()
    assert len((tmp_path / "whole/valid.jsonl").read_text().splitlines()) == 16


def test_the_best_weights_are_kept_as_the_callback_says(world, tmp_path, monkeypatch):
    given = iter([3.0, 1.0, 2.0, 5.0])
    monkeypatch.setattr(ts, "evaluate", lambda *_, **__: ({"val_loss": next(given)}, []))
    keep = "exp_manager.checkpoint_callback_params"
    ts.main(config(world.run, f"exp_manager.explicit_log_dir={tmp_path}/run", f"{keep}.mode=min",
                   f"{keep}.monitor=val_loss {keep}.save_top_k=2 trainer.val_check_interval=2",
                   f"{keep}.filename={{step}}-{{val_loss:.1f}} trainer.max_steps=6"))  # fmt: skip
    files = sorted(path.name for path in (tmp_path / "run").glob("step=*"))
    assert files == ["step=4-val_loss=1.0.pt", "step=6-val_loss=2.0.pt"]
    best = torch.load(tmp_path / "run" / files[0], weights_only=True)
    kept = torch.load(tmp_path / "run/salm.pt", weights_only=True)
    assert same(kept, {name: value for name, value in best.items() if "lora_" not in name})


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_are_one_with_the_doubled_batch(world, tmp_path, strategy):
    even = f"{world.run} {EVEN} data.train_ds.manifest_filepath={world.manifest} save_every=3"
    even += " loss.distill_weight=1 trainer.val_check_interval=3 trainer.max_steps=3"
    one, two = (f"exp_manager.explicit_log_dir={tmp_path}/{name}" for name in ("one", "two"))
    ts.main(config(even, one, "data.train_ds.batch_size=8"))
    run_processes(ts.main, config(even, two, f"trainer.strategy={strategy}"))
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=2e-5, rtol=1e-3, msg=name)
    logged = [json.loads((tmp_path / f"{name}/metrics.jsonl").read_text().splitlines()[-1])
              for name in ("one", "two")]  # fmt: skip
    assert logged[0]["val_loss"] == pytest.approx(logged[1]["val_loss"], rel=1e-4)


def test_fsdp_goes_on_to_the_bit(world, tmp_path):
    rest = f"{world.run} trainer.strategy=fsdp2"
    run_processes(ts.main, config(rest, f"exp_manager.explicit_log_dir={tmp_path}/whole"))
    cut = f"exp_manager.explicit_log_dir={tmp_path}/cut"
    run_processes(ts.main, config(rest, cut, "trainer.max_steps=2 model.lr_scheduler.max_steps=4"))
    run_processes(ts.main, config(rest, cut))
    assert same(trained(tmp_path / "whole"), trained(tmp_path / "cut"))


def test_requests_are_answered_by_the_llm_itself_and_kl_alone_draws_near(world, tmp_path):
    asked = f"{{type: spoken_requests, manifest_filepath: {world.manifest}}}"
    (tmp_path / "a.yaml").write_text(
        f"data: {{train_ds: {{input_cfg: [{asked}], manifest_filepath: []}}, answer_tokens: 5,\n"
        f"  validation_ds: {{datasets: {{asked: {{input_cfg: [{asked}]}}}}}}}}\n"
    )
    own = f"exp_manager.explicit_log_dir={tmp_path}/run loss.ce_weight=0 loss.distill_weight=1"
    rest = "trainer.num_sanity_val_steps=1 trainer.max_steps=12 model.optimizer.lr=1e-2"
    base = world.run.replace(f"data.train_ds.manifest_filepath={world.both}", "")
    drop = [part for part in base.split() if "validation_ds.datasets" not in part]
    ts.main(config(" ".join(drop), tmp_path / "a.yaml", own, rest, "trainer.val_check_interval=12"))
    answers = [json.loads(x) for x in (tmp_path / "run/answers.jsonl").read_text().splitlines()]
    llm, tokenizer = model.load_llm(config(world.run).model.pretrained_llm)
    row = next(row for row in answers if row["key"] == world.clips[0]["key"])
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": world.clips[0]["target"]}], add_generation_prompt=True,
        enable_thinking=False, return_tensors="pt", return_dict=False)  # fmt: skip
    said = llm.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=[])[0, ids.shape[1] :]
    said = tokenizer.decode(said, skip_special_tokens=True).strip()
    assert said.startswith(row["answer"]) and row["answer"] and len(answers) == 8
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    kl = [row["val_kl"] for row in rows if "val_kl" in row]
    assert kl[-1] < kl[0]


def test_infer_hears_a_conversation_as_validation_does(world, tmp_path, monkeypatch):
    run = tmp_path / "run"
    ts.main(config(world.run, f"exp_manager.explicit_log_dir={run} trainer.val_check_interval=4"))
    monkeypatch.setattr(model, "token_cap", lambda *_: 6)  # as many as in validation
    wanted = [json.loads(x) for x in (run / "valid.jsonl").read_text().splitlines()]
    wanted = {line["key"]: line["text"] for line in wanted}
    paths = [str(world.folder / "wavs" / clip["source"]) for clip in world.clips[:2]]
    rest = [f"model.dir={run}", "workers=0", "device=cpu", f"out={tmp_path}/out.jsonl"]
    asked = [f"{paths[0]}+{paths[1]}", *rest, "prompt=Both: <audio> <audio>"]
    arguments = infer.split_arguments(asked)
    infer.main(model.load_config(arguments, infer.DEFAULTS))
    (line,) = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert line["key"] == "utt000+utt001" and line["text"] == wanted["pair0"]
    wrong = [*arguments, "prompt=Both: <audio>", f"out={tmp_path}/b.jsonl"]
    with pytest.raises(model.UserError, match="1 x <audio> for 2 recordings"):
        infer.main(model.load_config(wrong, infer.DEFAULTS))
    arguments = infer.split_arguments([str(world.manifest), *rest])
    infer.main(model.load_config(arguments, infer.DEFAULTS))
    lines = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {x["key"]: x["text"] for x in lines} == {x["key"]: wanted[x["key"]] for x in lines}


@pytest.mark.parametrize("kind", ["AudioAdaptor", "IdentityConnector"])
def test_other_adapters_random_weights_and_init_from(world, tmp_path, kind):
    adapter = "model.perception.modality_adapter"
    small = f"{adapter}.adaptor.hidden_dim=16 {adapter}.adaptor.num_heads=2"
    small += f" {adapter}.adaptor.stack=4"
    own = f"{adapter}._target_=my.{kind} {small} model.pretrained_weights=false trainer.max_steps=2"
    ts.main(config(world.run, own, f"exp_manager.explicit_log_dir={tmp_path}/one"))
    salm, cfg, _ = build(world, own, f"model.init_from={tmp_path}/one", "model.lora=null")
    best = torch.load(tmp_path / "one/salm.pt", weights_only=True)
    state = salm.state_dict()
    assert all(torch.equal(state[name], value) for name, value in best.items())
    assert any(name.startswith("llm.model.layers") for name in best)  # nobody else has them
    lora = [name for name in state if "lora_B" in name]
    assert lora and any(state[name].abs().sum() > 0 for name in lora)


def test_pad_may_be_eos(world, qwen3_folder, tmp_path):
    import transformers

    folder = tmp_path / "llm"
    tokenizer = transformers.AutoTokenizer.from_pretrained(qwen3_folder)
    tokenizer.pad_token = tokenizer.eos_token
    transformers.AutoModelForCausalLM.from_pretrained(qwen3_folder).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    one, _, data = build(world, EVEN)
    two, _, other = build(world, EVEN, f"model.pretrained_llm={folder}")
    two.load_state_dict(one.state_dict())
    batches = data[0, 0, [[0, 7]]], other[0, 0, [[0, 7]]]
    assert batches[0].rows[0]["labels"] == batches[1].rows[0]["labels"]
    pairs = zip((one, two), batches, strict=True)
    sums = [salm.eval()(batch.feats, batch) for salm, batch in pairs]
    assert sums[0]["ce"] == sums[1]["ce"]


def test_a_changed_folder_of_clips_is_read_again(world, tmp_path):
    kaldi = tmp_path / "kaldi"
    kaldi.mkdir()
    names = [Path(clip["source"]).stem for clip in world.clips]

    def list_them(names):
        lines = [f"{name} {world.folder}/wavs/{name}.wav\n" for name in names]
        (kaldi / "wav.scp").write_text("".join(lines))
        (kaldi / "text").write_text("".join(f"{name} {name}\n" for name in names[1:]))
        ts.open_manifest.cache_clear()  # another start
        _, _, data = build(world, f"data.train_ds.manifest_filepath={kaldi}")
        clips = [json.loads(audio)[0] for audio in data.rows["audio"]]
        heard = [Path(ts.clip_row(clip, data.cache_dir)["source"]).stem for clip in clips]
        assert heard == data.rows["key"][:] == names
        return data.rows["reason"][:]

    assert list_them(names[2:5]) == ["no answer", "", ""]  # no transcript is no silence
    assert list_them(names[:5]) == ["no answer", "", "", "", ""]


def test_what_a_template_drops_of_an_answer_is_refused(tokenizer):
    thinks = copy.deepcopy(tokenizer)
    thinks.chat_template = tokenizer.chat_template.replace(
        "message.content + '<|im_end|>", "message.content.split('</think>')[-1] + '<|im_end|>")
    turns = [("user", "please <a>"), ("assistant", "<think>\nhm\n</think>\n\none")]
    with pytest.raises(ValueError, match="drops or repeats a part"):
        ts.render(thinks, turns, "<a>")
    _, labels = ts.render(tokenizer, turns, "<a>")
    assert tokenizer.decode([x for x in labels if x >= 0]).endswith("one<|im_end|>")


def test_segments_sides_and_the_first_second_are_heard():
    heard = [turn("User", "a.wav", "audio", offset=0, duration=2.0, channel=0)]
    row = {"conversations": [*heard, turn("Assistant", "x")]}
    (clip,) = ts.json_turns(row, "<audio>", "")[1]
    assert (clip["start"], clip["end"], clip["channel"]) == (0.0, 2.0, "0")


def test_the_control_never_plays_the_right_recording(world):
    twice = [json.loads(line) for line in world.manifest.read_text().splitlines()]
    rows = [row | {"key": f"{row['key']}-{n}", "prompt": f"{n}:"} for n in (1, 2) for row in twice]
    for row in rows:
        row["source"] = str(world.folder / "wavs" / row["source"])
    manifest = write(world.folder / "twice.jsonl", rows)
    salm, cfg, data = build(world, EVEN, f"data.train_ds.manifest_filepath={manifest}")
    seen, real = [], ts.Conversations.__getitem__

    class Listening(ts.Conversations):
        def __getitem__(self, place):
            batch = real(self, place)
            for n, row in zip(place[2][0], batch.rows, strict=True):
                seen.append((self.swapped[n], row["audio"]))
            return batch

    amp = torch.autocast("cpu", enabled=False)
    run = SimpleNamespace(device=torch.device("cpu"), amp=amp, rank=0, world=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ts, "Conversations", Listening)
        ts.evaluate(salm, salm, {"a": data}, run, swap=True)
    assert len(seen) == 16
    for other, own in seen:
        assert ts.recording(other[0], data) != ts.recording(own[0], data)


def test_a_later_run_keeps_what_earlier_ones_have_trained(world, tmp_path):
    first = "model.freeze_params=^llm\\.model\\.layers\\.0.+$ model.lora=null trainer.max_steps=1"
    ts.main(config(world.run, first, f"exp_manager.explicit_log_dir={tmp_path}/one"))
    one = torch.load(tmp_path / "one/salm.pt", weights_only=True)
    chain = f"model.init_from={tmp_path}/one trainer.max_steps=1"
    ts.main(config(world.run, chain, f"exp_manager.explicit_log_dir={tmp_path}/two"))
    two = torch.load(tmp_path / "two/salm.pt", weights_only=True)
    name = "perception.encoder.net.layers.0.fc1.weight"
    assert torch.equal(one[name], two[name])
    wrapped = "llm.model.layers.1.self_attn.q_proj"  # beside LoRA, which the first had not
    assert torch.equal(one[f"{wrapped}.weight"], two[f"{wrapped}.base_layer.weight"])


def test_two_processes_validate_with_the_statistics_that_are_saved(world, tmp_path):
    rest = f"{world.run} trainer.strategy=fsdp2 loss.distill_weight=1 trainer.max_steps=6"
    rest += " data.validation_ds.max_new_tokens=30 model.optimizer.lr=1e-2"
    run_processes(ts.main, config(rest, f"exp_manager.explicit_log_dir={tmp_path}/run"))
    rows = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    best = max((row for row in rows if "val_acc" in row), key=lambda row: row["val_acc"])
    salm, cfg, data = build(world, f"model.init_from={tmp_path}/run model.lora=null")
    amp = torch.autocast("cpu", enabled=False)
    run = SimpleNamespace(device=torch.device("cpu"), amp=amp, rank=0, world=1)
    scores, _ = ts.evaluate(salm, salm, {"pairs": data}, run)
    assert scores["val_loss_pairs"] == pytest.approx(best["val_loss_pairs"], rel=1e-4)
