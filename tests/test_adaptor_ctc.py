"""AudioAdaptor, CTC and SpecAugment against hand-built references, brute force and FunASR."""

import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model

SMALL = {"input_dim": 12, "output_dim": 20, "hidden_dim": 16, "num_layers": 2, "num_heads": 4}
GARBAGE = [math.nan, math.inf, -math.inf, 1e30]


def small_adaptor(**settings):
    torch.manual_seed(0)
    return model.AudioAdaptor(**(SMALL | settings)).eval()


def batch(lens=(9, 5), width=12):
    return torch.randn(len(lens), max(lens), width), torch.tensor(lens)


LAYER = ["self_attn.in_proj_", "self_attn.out_proj.", "linear1.", "linear2.", "norm1.", "norm2."]
PUBLISHED = [f"transformer.layers.{n}.{part}" for n in range(4) for part in LAYER]
PUBLISHED += ["input_proj.", "output_proj.", "norm."]


def test_default_size_and_names_are_the_published_ones():
    with torch.device("meta"):
        adaptor = model.AudioAdaptor()
    state = adaptor.state_dict()
    assert sum(p.numel() for p in adaptor.parameters()) == 207_734_272
    assert set(state) == {f"{part}{kind}" for part in PUBLISHED for kind in ("weight", "bias")}
    assert state["input_proj.weight"].shape == (2048, 512)
    assert state["transformer.layers.3.linear1.weight"].shape == (8192, 2048)
    assert state["output_proj.weight"].shape == (2560, 2048)


def test_layers_start_differently_and_the_output_as_loud_as_embeddings():
    rms = model.embedding_rms(table := 0.02 * torch.randn(500, 20))
    assert rms == pytest.approx(table.square().mean().sqrt().item(), rel=1e-5)
    emb, _ = (adaptor := small_adaptor(embedding_rms=rms))(*batch((9, 9)))
    assert emb.square().mean().sqrt().item() == pytest.approx(rms, rel=0.01)
    first, second = (layer.state_dict() for layer in adaptor.transformer.layers)
    for name in (f"{part}weight" for part in LAYER[:4]):
        assert not torch.equal(first[name], second[name])
        assert first[name].std().item() == pytest.approx(second[name].std().item(), rel=0.2)


def by_hand(adaptor, enc, pre_norm):
    """The published adaptor's computation for one clip."""
    x = adaptor.input_proj(enc)[:, None]  # (T, 1, hidden)
    for layer in adaptor.transformer.layers:
        same = nn.TransformerEncoderLayer(16, 4, 64, activation="gelu", norm_first=pre_norm).eval()
        same.load_state_dict(layer.state_dict())
        x = same(x)
    return adaptor.norm(adaptor.output_proj(x))[:, 0]


@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "torch's fast path"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_equals_the_computation_by_hand(pre_norm, gradients):
    adaptor, (enc, lens) = small_adaptor(pre_norm=pre_norm), batch()
    before = enc.clone()
    with torch.set_grad_enabled(gradients):
        emb, emb_lens = adaptor(enc, lens)
    assert emb_lens.tolist() == [9, 5] and torch.equal(enc, before)
    for row, n in enumerate(lens):
        torch.testing.assert_close(emb[row, :n], by_hand(adaptor, enc[row, :n], pre_norm))
    assert not torch.equal(adaptor.train()(enc, lens)[0], emb), "dropout is for training"


@pytest.mark.parametrize("value", GARBAGE)
@pytest.mark.parametrize("settings", [{}, {"stack": 2}, {"num_layers": 0, "stack": 4},
                                      {"pre_norm": True}])  # fmt: skip
def test_padding_never_reaches_a_real_position_or_a_gradient(settings, value):
    adaptor, (enc, lens) = small_adaptor(**settings), batch()
    enc[1, 5:] = value
    enc.requires_grad_(True)
    emb, emb_lens = adaptor(enc, lens)
    single, (n,) = adaptor(enc[1:, :5], lens[1:])
    assert emb_lens[1] == n and (emb[1, n:] == 0).all()
    torch.testing.assert_close(emb[1, :n], single[0, :n], atol=1e-6, rtol=1e-5)
    emb.square().sum().backward()
    assert (enc.grad[1, 5:] == 0).all() and (enc.grad[1, :5] != 0).any()
    assert all(p.grad.isfinite().all() for p in adaptor.parameters())


def test_stacking_pads_a_ragged_tail_and_hears_it():
    for stack, frames in itertools.product((1, 2, 3, 5), range(1, 12)):
        emb, emb_lens = (adaptor := small_adaptor(stack=stack))(*batch((frames,)))
        assert emb.shape[1] == emb_lens[0] == adaptor.out_lens(frames) == math.ceil(frames / stack)
    adaptor, enc = small_adaptor(num_layers=0, stack=2), torch.randn(1, 5, 12)
    pairs = torch.cat([enc[0], torch.zeros(1, 12)]).view(3, 24)  # frames (0, 1), (2, 3), (4, none)
    expected = adaptor.norm(adaptor.output_proj(F.gelu(adaptor.input_proj(pairs))))
    torch.testing.assert_close(adaptor(enc, torch.tensor([5]))[0][0], expected)
    assert {k.split(".")[0] for k in adaptor.state_dict()} == {"input_proj", "output_proj", "norm"}


def test_wrong_shapes_lengths_and_settings_are_refused():
    for width, lens in ((13, [5, 5]), (12, [5, 0]), (12, [6, 5]), (12, [-1, 5])):
        with pytest.raises(ValueError, match=r"\(B, T, 12\) and lengths in 1..T expected"):
            small_adaptor()(torch.zeros(2, 5, width), torch.tensor(lens))
    for name, value in (("num_heads", 5), ("num_heads", 0), ("stack", 0)):
        with pytest.raises(model.UserError, match=f"adaptor: .*{name}={value}"):
            small_adaptor(**{name: value})


TOKENS = [3, 7, 11, 12, 20, 29]


def tied_head(width=8):
    torch.manual_seed(0)
    table = 0.05 * torch.randn(30, width)
    return model.CTCHead(table, TOKENS), table


def test_positions_are_scored_against_the_embeddings_and_a_blank():
    (head, table), x = tied_head(), torch.randn(2, 4, 8, requires_grad=True)
    nn.init.constant_(head.blank_bias, 0.7)
    rows = torch.cat([table[TOKENS], head.blank_row[None].detach()])
    logits = x @ rows.T * head.log_scale.exp() + torch.cat([torch.zeros(6), head.blank_bias])
    torch.testing.assert_close(head(x), logits.log_softmax(-1))
    learned = {name for name, p in head.named_parameters() if p.requires_grad}
    assert learned == {"blank_row", "blank_bias", "log_scale"} and "rows" not in head.state_dict()
    model.ctc_loss(head(x), torch.tensor([4, 4]), [[1, 2], [3]], head.blank)[0].backward()
    assert x.grad.abs().sum() > 0 and head.blank_row.grad.abs().sum() > 0
    assert head.classes([29, 3, 4, 7]) == [5, 0, 1]  # 4 is not among the head's tokens
    assert head.tokens([5, 0, 1]) == [29, 3, 7]
    with torch.autocast("cpu", torch.bfloat16):
        scores = head(x)
    torch.testing.assert_close(scores, head(x), atol=1e-6, rtol=0)


def test_scores_start_at_standard_deviation_one_and_a_match_at_root_width():
    table = 0.02 * torch.randn(400, 256)
    scale = model.CTCHead(table, range(400)).log_scale.exp()
    unrelated = 0.02 * torch.randn(50, 256) @ table.T
    assert (unrelated * scale).std().item() == pytest.approx(1.0, rel=0.1)
    assert (scale * table.square().sum(-1)).mean().item() == pytest.approx(16.0, rel=0.1)


def test_a_head_is_loaded_with_its_tokens(tmp_path):
    head, table = tied_head()
    torch.save(head.state_dict(), tmp_path / "ctc.pt")
    again, x = model.CTCHead.load(tmp_path / "ctc.pt", table), torch.randn(1, 3, 8)
    for other in (again, pickle.loads(pickle.dumps(head))):
        assert torch.equal(other(x), head(x)) and other.tokens([5]) == [29]
    torch.save({"blank_bias": torch.zeros(1)}, tmp_path / "ctc.pt")
    with pytest.raises(model.UserError, match="ctc.pt: does not fit the CTCHead.*token_ids"):
        model.CTCHead.load(tmp_path / "ctc.pt", table)


def collapse(path, blank):
    return [label for label, _ in itertools.groupby(path) if label != blank]


def test_loss_of_a_padded_batch_equals_the_sum_over_all_paths_of_each_row():
    targets, lens = [[0], [0, 1], [1, 1], [0, 1, 0], [1, 1, 0]], torch.tensor([3, 5, 4, 6, 5])
    log_probs, expected = torch.randn(5, 6, 3).log_softmax(-1), 0.0
    for row, target, n in zip(log_probs, targets, lens.tolist(), strict=True):
        paths = [p for p in itertools.product(range(3), repeat=n) if collapse(p, 2) == target]
        scores = [sum(float(row[s, c]) for s, c in enumerate(path)) for path in paths]
        expected -= math.log(sum(map(math.exp, scores)))
        row[n:] = 50 * torch.randn(6 - n, 3)
    loss, left_out = model.ctc_loss(log_probs, lens, targets, 2)
    assert (loss.item(), left_out) == (pytest.approx(expected, rel=1e-5), 0)


def test_rows_without_a_path_are_counted_and_left_out():
    labels = [[], [1], [1, 2], [1, 1], [1, 1, 1, 2, 2]]
    assert [model.ctc_min_frames(row) for row in labels] == [0, 1, 2, 3, 8]
    log_probs = torch.randn(4, 4, 4).log_softmax(-1).requires_grad_(True)
    lens = torch.tensor([4, 2, 2, 4])
    loss, left_out = model.ctc_loss(log_probs, lens, [[0, 1], [1, 1], [0, 1, 2], []], 3)
    alone, _ = model.ctc_loss(log_probs[:1], lens[:1], [[0, 1]], 3)
    assert left_out == 3 and loss.item() == pytest.approx(alone.item(), rel=1e-6)
    loss.backward()
    assert log_probs.grad.isfinite().all() and (log_probs.grad[1:] == 0).all()
    log_probs.grad = None
    loss, left_out = model.ctc_loss(log_probs, lens, [[0] * 9] * 4, 3)
    loss.backward()  # it has a graph, so that all processes of a step may call backward
    assert (loss.item(), left_out) == (0.0, 4) and (log_probs.grad == 0).all()


def test_read_out_merges_repeats_drops_blanks_and_ends_with_its_clip():
    best, lens = torch.randint(0, 3, (40, 25)), torch.randint(1, 26, (40,))
    rows = zip(best.tolist(), lens.tolist(), strict=True)
    assert model.ctc_paths(best, lens, 1) == [collapse(row[:n], 1) for row, n in rows]


def soft_speech(log_probs, lens, head):
    return model.ctc_soft_speech(log_probs, log_probs.argmax(-1), lens, head)


@pytest.mark.parametrize("padding", GARBAGE)
def test_soft_speech_equals_a_loop_over_runs(padding):
    head, lens, rows = tied_head()[0], torch.tensor([12, 7, 1, 12, 5]), []
    log_probs = (3 * torch.randn(5, 12, 7)).log_softmax(-1)
    log_probs[0, 3:5] = log_probs[0, 2]  # a run of three
    log_probs[4, :, head.blank] = 5.0  # where CTC hears nothing: the mean of the clip
    log_probs[1, 7:] = log_probs[2, 1:] = log_probs[4, 5:] = padding
    log_probs.requires_grad_(True)
    soft, soft_lens = soft_speech(log_probs, lens, head)
    for scores, n in zip(log_probs, lens.tolist(), strict=True):
        groups = itertools.groupby(range(n), key=scores[:n].argmax(-1).tolist().__getitem__)
        runs = [list(run) for label, run in groups if label != head.blank] or [list(range(n))]
        posteriors = scores[:n, : head.blank].softmax(-1) @ head.rows[: head.blank]
        rows.append(torch.stack([posteriors[run].mean(0) for run in runs]))
    assert soft_lens.tolist() == [len(row) for row in rows] and soft_lens[4] == 1
    expected = nn.utils.rnn.pad_sequence(rows, True)
    torch.testing.assert_close(soft, expected)
    weights = torch.randn_like(soft)
    grads = [torch.autograd.grad((x * weights).sum(), log_probs)[0] for x in (soft, expected)]
    torch.testing.assert_close(*grads)
    assert (grads[0][1, 7:] == 0).all() and grads[0].isfinite().all()


@pytest.mark.parametrize("speech", ["frames", "ctc"])
def test_what_is_heard_is_adaptor_frames_or_soft_speech(speech):
    head, adaptor, (enc, lens) = tied_head()[0], small_adaptor(output_dim=8, stack=2), batch()
    emb, emb_lens = adaptor(enc, lens)
    log_probs = head(emb)
    heard = model.hear(adaptor, head, enc, lens, speech)
    expected = (emb, emb_lens) if speech == "frames" else soft_speech(log_probs, emb_lens, head)
    assert torch.equal(heard.speech, expected[0]) and torch.equal(heard.speech_lens, expected[1])
    assert torch.equal(heard.log_probs, log_probs) and torch.equal(heard.lens, emb_lens)
    assert heard.paths == model.ctc_paths(log_probs.argmax(-1), emb_lens, head.blank)
    if speech == "frames":
        assert model.hear(adaptor, head, enc, lens, read_ctc=False).paths is None
        deaf = model.hear(adaptor, None, enc, lens)
        assert torch.equal(deaf.speech, emb) and deaf.log_probs is deaf.paths is None


def masks(augment, frames=40, draws=1500):
    return torch.stack([augment(torch.ones(frames, 560)) == 0 for _ in range(draws)])


@pytest.mark.parametrize("only", [{"apply_time_mask": False}, {"apply_freq_mask": False}])
def test_masks_have_funasrs_distribution(only):
    from funasr.models.specaug.specaug import SpecAugLFR

    settings = {"lfr_rate": 6, "time_mask_width_range": (0, 12)} | only
    theirs = SpecAugLFR(**settings, apply_time_warp=False).train()
    one = lambda x: theirs(x[None], torch.tensor([len(x)]))[0][0]  # noqa: E731
    axis = 1 if "apply_time_mask" in only else 2  # the axis on which the mask is constant
    ours, theirs = masks(model.SpecAugLFR(**settings, fill="zero").train()), masks(one)
    if axis == 1:  # the same bins in all seven stacked frames
        hidden = ours.unflatten(-1, (7, 80))
        assert (hidden == hidden[:, :1, :1]).all()
    ours, theirs = ours.any(axis).float(), theirs.any(axis).float()
    for found in (torch.mean, torch.std):
        assert found(ours.mean(1)).item() == pytest.approx(found(theirs.mean(1)).item(), abs=0.01)
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.06, rtol=0)  # by bin or frame


def test_max_ratio_caps_each_time_mask_and_every_place_is_used():
    settings = {"apply_freq_mask": False, "num_time_mask": 1, "time_mask_width_range": (0, 50)}
    for frames, ratio, longest in ((60, 0.1, 6), (17, 0.1, 1), (8, 0.1, 0), (10, 1.0, 10)):
        augment = model.SpecAugLFR(**settings, time_mask_max_ratio=ratio, fill="zero").train()
        hidden = [augment(torch.ones(frames, 7))[:, 0] == 0 for _ in range(300)]
        assert max(int(row.sum()) for row in hidden) == longest
        assert sum(hidden).count_nonzero() >= (frames - 1 if longest else 0)


def test_masks_are_filled_with_the_clips_mean_or_zero_in_training_only_or_refused():
    feats = 4 + torch.randn(30, 560)
    before = feats.clone()
    augment = model.SpecAugLFR(time_mask_width_range=(1, 10), freq_mask_width_range=(1, 20))
    assert torch.equal(augment.eval()(feats), feats)
    augment.train()
    made = [augment(feats, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(feats, before), "the input was modified"
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    hidden = made[0] != feats
    assert 0 < hidden.float().mean() < 0.9
    torch.testing.assert_close(made[0][hidden], feats.mean(0).expand(30, -1)[hidden])
    augment.fill = "zero"
    assert torch.equal(augment(feats, torch.Generator().manual_seed(1)), feats * ~hidden)
    for wrong in ({"time_mask_width_range": (5, 5)}, {"fill": "noise"}):
        with pytest.raises(model.UserError, match="specaug: "):
            model.SpecAugLFR(**wrong)
