"""AudioAdaptor, CTC and SpecAugment against hand-built references, brute force and FunASR."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import model

SMALL = {"input_dim": 12, "output_dim": 20, "hidden_dim": 16, "num_layers": 2, "num_heads": 4}


def small_adaptor(**kwargs):
    torch.manual_seed(0)
    return model.AudioAdaptor(**(SMALL | kwargs)).eval()


def batch(lens=(9, 5), width=12):
    return torch.randn(len(lens), max(lens), width), torch.tensor(lens)


# ---- AudioAdaptor -----------------------------------------------------------------------------------------------

LAYER = [
    "self_attn.in_proj_weight", "self_attn.in_proj_bias", "self_attn.out_proj.weight", "self_attn.out_proj.bias",
    *(f"{part}.{kind}" for part in ("linear1", "linear2", "norm1", "norm2") for kind in ("weight", "bias")),
]  # fmt: skip
PUBLISHED = {
    *(f"{part}.{kind}" for part in ("input_proj", "output_proj", "norm") for kind in ("weight", "bias")),
    *(f"transformer.layers.{n}.{name}" for n in range(4) for name in LAYER),
}


def test_default_size_and_names_are_the_published_ones():
    with torch.device("meta"):
        adaptor = model.AudioAdaptor()
    state = adaptor.state_dict()
    assert sum(p.numel() for p in adaptor.parameters()) == 207_734_272
    assert set(state) == PUBLISHED
    assert state["input_proj.weight"].shape == (2048, 512)
    assert state["transformer.layers.3.linear1.weight"].shape == (8192, 2048)
    assert state["output_proj.weight"].shape == (2560, 2048)


def test_every_layer_starts_with_weights_of_its_own_and_the_seed_decides_them():
    state, again, other = (net.state_dict() for net in (small_adaptor(), small_adaptor(), model.AudioAdaptor(**SMALL)))
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(state["input_proj.weight"], other["input_proj.weight"])  # the seed was used up by `again`
    for name in ("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"):
        first, second = (state[f"transformer.layers.{n}.{name}"] for n in (0, 1))
        assert not torch.equal(first, second)
        assert first.std().item() == pytest.approx(second.std().item(), rel=0.2)  # same distribution


def by_hand(adaptor, enc, heads=4, pre_norm=False):
    """The published adaptor's computation for one clip, written out from its weights alone."""
    w = adaptor.state_dict()

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def attention(x, layer):
        qkv = F.linear(x, w[f"{layer}.self_attn.in_proj_weight"], w[f"{layer}.self_attn.in_proj_bias"])
        query, key, value = (t.unflatten(-1, (heads, -1)).transpose(0, 1) for t in qkv.chunk(3, dim=-1))
        weights = (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(-1)
        return linear((weights @ value).transpose(0, 1).flatten(1), f"{layer}.self_attn.out_proj")

    def feed_forward(x, layer):
        return linear(F.gelu(linear(x, f"{layer}.linear1")), f"{layer}.linear2")

    x = linear(enc, "input_proj")
    for layer in ("transformer.layers.0", "transformer.layers.1"):
        if pre_norm:
            x = x + attention(norm(x, f"{layer}.norm1"), layer)
            x = x + feed_forward(norm(x, f"{layer}.norm2"), layer)
        else:
            x = norm(x + attention(x, layer), f"{layer}.norm1")
            x = norm(x + feed_forward(x, layer), f"{layer}.norm2")
    return norm(linear(x, "output_proj"), "norm")


@pytest.mark.parametrize("training_path", [True, False], ids=["with gradients", "no_grad fast path"])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_equals_the_computation_by_hand(pre_norm, training_path):
    adaptor, (enc, lens) = small_adaptor(pre_norm=pre_norm), batch()
    with torch.set_grad_enabled(training_path):
        emb, emb_lens = adaptor(enc, lens)
    assert emb_lens.tolist() == [9, 5]
    for row, n in enumerate(lens):
        torch.testing.assert_close(emb[row, :n], by_hand(adaptor, enc[row, :n], pre_norm=pre_norm), atol=1e-5, rtol=0)


def test_equals_torchs_encoder_without_a_mask_on_full_length_input():
    adaptor, (enc, lens) = small_adaptor(), batch((7, 7))
    layer = nn.TransformerEncoderLayer(16, 4, 64, activation="gelu", batch_first=True)
    plain = nn.Sequential(nn.Linear(12, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 20), nn.LayerNorm(20))
    names = {"input_proj": "0", "transformer": "1", "output_proj": "2", "norm": "3"}
    state = {name.replace(name.split(".")[0], names[name.split(".")[0]], 1): v for name, v in
             adaptor.state_dict().items()}  # fmt: skip
    plain.load_state_dict(state, strict=True)
    torch.testing.assert_close(adaptor(enc, lens)[0], plain.eval()(enc), atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("kwargs", [{}, {"stack": 2}, {"num_layers": 0, "stack": 4}, {"pre_norm": True}])
def test_padding_never_reaches_a_real_position(kwargs, value):
    adaptor, (enc, lens) = small_adaptor(**kwargs), batch()
    enc[1, 5:] = value
    emb, emb_lens = adaptor(enc, lens)
    single, (n,) = adaptor(enc[1:, :5], lens[1:])
    assert emb_lens[1] == n
    torch.testing.assert_close(emb[1, :n], single[0, :n], atol=1e-6, rtol=1e-5)
    assert (emb[1, n:] == 0).all()


def test_no_gradient_flows_into_padding():
    adaptor, (enc, lens) = small_adaptor(stack=2), batch()
    enc[1, 5:] = float("nan")
    enc.requires_grad_(True)
    adaptor(enc, lens)[0].square().sum().backward()
    assert (enc.grad[1, 5:] == 0).all() and (enc.grad[1, :5] != 0).any()
    assert all(p.grad.isfinite().all() for p in adaptor.parameters())


@pytest.mark.parametrize("stack", [1, 2, 3, 5])
def test_stacking_pads_a_ragged_tail(stack):
    adaptor = small_adaptor(stack=stack)
    for frames in range(1, 12):
        emb, emb_lens = adaptor(torch.randn(1, frames, 12), torch.tensor([frames]))
        assert emb.shape[1] == emb_lens[0] == adaptor.out_lens(frames) == math.ceil(frames / stack)


def test_the_last_frame_of_a_ragged_clip_is_heard():
    adaptor, enc = small_adaptor(stack=4, num_layers=0), torch.randn(1, 5, 12)
    changed = enc.clone()
    changed[0, 4] += 1
    before, after = (adaptor(x, torch.tensor([5]))[0] for x in (enc, changed))
    assert torch.equal(before[0, 0], after[0, 0]) and not torch.allclose(before[0, 1], after[0, 1])


def test_without_layers_it_is_linear_gelu_linear_over_stacked_frames():
    adaptor, enc = small_adaptor(num_layers=0, stack=2), torch.randn(1, 6, 12)
    pairs = torch.stack([torch.cat([enc[0, 2 * i], enc[0, 2 * i + 1]]) for i in range(3)])
    expected = adaptor.norm(adaptor.output_proj(F.gelu(adaptor.input_proj(pairs))))
    torch.testing.assert_close(adaptor(enc, torch.tensor([6]))[0][0], expected)
    assert {name.split(".")[0] for name in adaptor.state_dict()} == {"input_proj", "output_proj", "norm"}


def test_output_starts_at_the_loudness_of_the_embedding_table():
    table = 0.02 * torch.randn(500, 20)
    rms = model.embedding_rms(table)
    assert rms == pytest.approx(table.square().mean().sqrt().item(), rel=1e-5)
    emb, _ = small_adaptor(embedding_rms=rms)(*batch((9, 9)))
    assert emb.square().mean().sqrt().item() == pytest.approx(rms, rel=0.01)


@pytest.mark.parametrize(
    "shape, lens", [((2, 5, 13), [5, 5]), ((2, 5, 12), [5, 0]), ((2, 5, 12), [6, 5]), ((2, 5, 12), [-1, 5])]
)
def test_wrong_width_or_length_is_refused(shape, lens):
    with pytest.raises(ValueError, match="AudioAdaptor takes"):
        small_adaptor()(torch.zeros(shape), torch.tensor(lens))


def test_input_is_not_modified_and_dropout_is_off_in_eval():
    adaptor, (enc, lens) = small_adaptor(), batch()
    before = enc.clone()
    assert torch.equal(adaptor(enc, lens)[0], adaptor(enc, lens)[0])
    assert torch.equal(enc, before)
    adaptor.train()
    assert not torch.equal(adaptor(enc, lens)[0], adaptor(enc, lens)[0])


# ---- CTCHead ----------------------------------------------------------------------------------------------------


def tied_head(classes=6, width=8):
    torch.manual_seed(0)
    table = 0.05 * torch.randn(30, width)
    return model.CTCHead(width, embedding=table, token_ids=[3, 7, 11, 12, 20, 29][:classes]), table


def random_log_probs(rows, positions, classes):
    return torch.randn(rows, positions, classes).log_softmax(-1)


def test_own_vocabulary_is_one_linear_with_the_blank_last():
    head, x = model.CTCHead(8, vocab_size=5), torch.randn(2, 4, 8)
    assert head.blank == 5 and {name for name, _ in head.named_parameters()} == {"proj.weight", "proj.bias"}
    torch.testing.assert_close(head(x), F.linear(x, head.proj.weight, head.proj.bias).log_softmax(-1))


def test_tied_head_scores_frames_against_the_embeddings():
    head, table = tied_head()
    x = torch.randn(2, 4, 8)
    rows = torch.cat([table[[3, 7, 11, 12, 20, 29]], head.blank_row[None].detach()])
    logits = x @ rows.T * head.log_scale.exp() + torch.cat([torch.zeros(6), head.blank_bias])
    torch.testing.assert_close(head(x), logits.log_softmax(-1))
    assert {name for name, p in head.named_parameters() if p.requires_grad} == {"blank_row", "blank_bias", "log_scale"}


def test_tied_scores_start_at_standard_deviation_one_and_a_match_at_root_width():
    torch.manual_seed(0)
    table = 0.02 * torch.randn(400, 256)
    head = model.CTCHead(256, embedding=table)
    unrelated = 0.02 * torch.randn(1, 50, 256) * head.log_scale.exp()
    assert (unrelated @ table.T).std().item() == pytest.approx(1.0, rel=0.1)
    match = (table * head.log_scale.exp() * table).sum(-1)
    assert match.mean().item() == pytest.approx(16.0, rel=0.1)


def test_gradients_reach_the_speech_but_never_the_table():
    head, table = tied_head()
    x = torch.randn(1, 5, 8, requires_grad=True)
    loss, _ = head.loss(head(x), torch.tensor([5]), [[1, 2]])
    loss.backward()
    assert x.grad.abs().sum() > 0 and not head.table.requires_grad


def test_the_tables_copy_is_not_saved():
    assert "table" not in tied_head()[0].state_dict()


def test_classes_and_tokens_are_inverse():
    head, _ = tied_head()
    assert head.classes([29, 3, 4, 7]) == [5, 0, 1]  # 4 is not among the head's tokens
    assert head.tokens([5, 0, 1]) == [29, 3, 7]


def test_head_takes_one_kind_of_vocabulary():
    for kwargs in ({}, {"vocab_size": 3, "embedding": torch.zeros(3, 8)}):
        with pytest.raises(ValueError):
            model.CTCHead(8, **kwargs)


def collapse(path, blank):
    return [label for label, _ in itertools.groupby(path) if label != blank]


def test_loss_equals_the_sum_over_all_paths():
    head, log_probs = model.CTCHead(4, vocab_size=2), random_log_probs(1, 5, 3)
    for target in ([0], [0, 1], [1, 1], [0, 1, 0], [1, 1, 0]):
        probability = sum(
            math.exp(sum(float(log_probs[0, s, c]) for s, c in enumerate(path)))
            for path in itertools.product(range(3), repeat=5)
            if collapse(path, blank=2) == target
        )
        loss, impossible = head.loss(log_probs, torch.tensor([5]), [target])
        assert impossible == 0 and loss.item() == pytest.approx(-math.log(probability), rel=1e-4), target


def test_beam_search_finds_the_most_probable_sequence_and_its_sum_over_paths():
    for seed in range(5):
        torch.manual_seed(seed)
        log_probs = random_log_probs(1, 5, 3)[0]
        sums = {}
        for path in itertools.product(range(3), repeat=5):
            labels = tuple(collapse(path, blank=2))
            probability = math.exp(sum(float(log_probs[s, c]) for s, c in enumerate(path)))
            sums[labels] = sums.get(labels, 0.0) + probability
        found = model.ctc_beam_search(log_probs, blank=2, beam=200)  # wide enough to be exact
        assert {tuple(labels): pytest.approx(math.exp(score), rel=1e-4) for labels, score in found} == sums
        assert tuple(found[0][0]) == max(sums, key=sums.get)


def test_log_prob_of_a_sequence_is_what_the_exact_beam_says():
    log_probs = random_log_probs(1, 5, 3)[0]
    for labels, score in model.ctc_beam_search(log_probs, blank=2, beam=200):
        assert model.ctc_log_prob(log_probs, labels, 2) == pytest.approx(score, rel=1e-4)
    assert model.ctc_log_prob(log_probs, [0] * 6, 2) == -math.inf


def test_loss_equals_torchs_in_float64_on_a_padded_batch():
    head, lens = model.CTCHead(4, vocab_size=6), torch.tensor([20, 9, 14])
    log_probs, targets = random_log_probs(3, 20, 7), [[1, 2, 2, 3], [0], [5, 5, 5]]
    expected = sum(
        F.ctc_loss(log_probs[i, :n, None].double(), torch.tensor([targets[i]]), [int(n)], [len(targets[i])], 6,
                   reduction="sum")
        for i, n in enumerate(lens)
    )  # fmt: skip
    log_probs[1, 9:] = torch.randn(11, 7) * 50  # padding
    assert head.loss(log_probs, lens, targets)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_min_frames_counts_a_blank_between_equal_neighbours():
    assert [model.ctc_min_frames(labels) for labels in ([], [1], [1, 2], [1, 1], [1, 1, 1, 2, 2])] == [0, 1, 2, 3, 8]


def test_rows_with_more_labels_than_frames_are_counted_and_left_out():
    head, lens = model.CTCHead(4, vocab_size=3), torch.tensor([4, 2, 2])
    log_probs = random_log_probs(3, 4, 4).requires_grad_(True)
    loss, impossible = head.loss(log_probs, lens, [[0, 1], [1, 1], [0, 1, 2]])
    assert impossible == 2
    assert loss.item() == pytest.approx(head.loss(log_probs[:1], lens[:1], [[0, 1]])[0].item(), rel=1e-6)
    loss.backward()
    assert log_probs.grad.isfinite().all() and (log_probs.grad[1:] == 0).all()


def test_a_batch_without_a_possible_row_has_zero_loss_and_a_graph():
    head = model.CTCHead(4, vocab_size=3)
    log_probs = random_log_probs(1, 2, 4).requires_grad_(True)
    loss, impossible = head.loss(log_probs, torch.tensor([2]), [[0, 0]])
    loss.backward()
    assert (loss.item(), impossible) == (0.0, 1) and (log_probs.grad == 0).all()


def test_greedy_equals_groupby_on_random_scores():
    scores, lens = torch.randn(40, 25, 3), torch.randint(1, 26, (40,))
    expected = [collapse(row[:n].argmax(-1).tolist(), blank=1) for row, n in zip(scores, lens)]
    assert model.ctc_greedy(scores, lens, blank=1) == expected


# ---- alignment --------------------------------------------------------------------------------------------------


def best_path(log_probs, labels, blank):
    """All paths, the slow way: (log-probability, path) of the best one that reads `labels`."""
    paths = itertools.product(range(log_probs.shape[1]), repeat=len(log_probs))
    reading = (path for path in paths if collapse(path, blank) == labels)
    return max((sum(float(log_probs[s, c]) for s, c in enumerate(path)), path) for path in reading)


@pytest.mark.parametrize("labels", [[0], [0, 1], [1, 1], [1, 0, 1]])
def test_alignment_is_the_best_of_all_paths(labels):
    log_probs = random_log_probs(1, 6, 3)[0]
    _, path = best_path(log_probs, labels, blank=2)
    spans = model.ctc_align(log_probs, labels, blank=2)
    assert [span[0] for span in spans] == labels
    painted = [2] * 6
    for label, first, end, score in spans:
        painted[first:end] = [label] * (end - first)
        assert score == pytest.approx(log_probs[first:end, label].mean().item(), abs=1e-5)
    assert tuple(painted) == path


def test_alignment_of_a_hand_made_case():
    best = [3, 0, 0, 3, 1, 3, 1, 1, 3]  # blank is 3
    log_probs = (10 * F.one_hot(torch.tensor(best), 4).float()).log_softmax(-1)
    spans = model.ctc_align(log_probs, [0, 1, 1], blank=3)
    assert [span[:3] for span in spans] == [(0, 1, 3), (1, 4, 5), (1, 6, 8)]


def test_alignment_says_when_labels_do_not_fit():
    log_probs = random_log_probs(1, 2, 3)[0]
    with pytest.raises(ValueError, match="2 labels do not fit into 2"):
        model.ctc_align(log_probs, [1, 1], blank=2)
    assert model.ctc_align(log_probs, [], blank=2) == []


def test_word_times_join_pieces_of_a_word():
    spans = [(0, 2, 4, -0.1), (1, 5, 6, -0.1), (2, 8, 10, -0.1), (3, 10, 11, -0.1)]
    assert model.word_times(spans, [" trans", "fer", " me", "!"], 0.06) == [
        ("transfer", pytest.approx(0.12), pytest.approx(0.36)),
        ("me!", pytest.approx(0.48), pytest.approx(0.66)),
    ]


def test_word_times_take_each_chinese_character_as_a_word():
    spans = [(0, 0, 1, 0.0), (1, 2, 3, 0.0), (2, 4, 5, 0.0)]
    words = model.word_times(spans, ["今", "天", " ok"], 1.0)
    assert words == [("今", 0.0, 1.0), ("天", 2.0, 3.0), ("ok", 4.0, 5.0)]


# ---- soft speech ------------------------------------------------------------------------------------------------


def soft_speech_by_hand(log_probs, lens, head):
    rows = []
    for scores, n in zip(log_probs, lens.tolist()):
        best, runs, position = scores[:n].argmax(-1).tolist(), [], 0
        for label, group in itertools.groupby(best):
            size = len(list(group))
            if label != head.blank:
                runs.append(range(position, position + size))
            position += size
        vectors = []
        for run in runs or [range(n)]:
            posteriors = [scores[s, : head.blank].exp() / scores[s, : head.blank].exp().sum() for s in run]
            vectors.append(sum(p @ head.table for p in posteriors) / len(run))
        rows.append(torch.stack(vectors))
    return rows


def test_soft_speech_equals_a_loop_over_runs():
    head, _ = tied_head()
    lens = torch.tensor([12, 7, 1, 12])
    log_probs = (3 * torch.randn(4, 12, 7)).log_softmax(-1)
    log_probs[0, 3:5] = log_probs[0, 2]  # a run of three
    soft, soft_lens = model.ctc_soft_speech(log_probs, lens, head)
    expected = soft_speech_by_hand(log_probs, lens, head)
    assert soft_lens.tolist() == [len(row) for row in expected] and soft.shape[1] == max(soft_lens)
    for row, n in enumerate(soft_lens):
        torch.testing.assert_close(soft[row, :n], expected[row])
        assert (soft[row, n:] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_garbage_in_the_padding_changes_no_soft_speech(value):
    head, _ = tied_head()
    lens = torch.tensor([12, 7, 1])
    log_probs = (3 * torch.randn(3, 12, 7)).log_softmax(-1)
    log_probs[2, 0, head.blank] = 5.0  # a clip in which CTC hears nothing
    soft, soft_lens = model.ctc_soft_speech(log_probs, lens, head)
    log_probs[1, 7:] = log_probs[2, 1:] = value
    log_probs.requires_grad_(True)
    again, again_lens = model.ctc_soft_speech(log_probs, lens, head)
    assert torch.equal(again, soft) and torch.equal(again_lens, soft_lens)
    again.sum().backward()
    assert (log_probs.grad[1, 7:] == 0).all() and log_probs.grad.isfinite().all()


def test_a_clip_in_which_ctc_hears_nothing_gives_its_mean_posterior():
    head, _ = tied_head()
    log_probs = random_log_probs(2, 5, 7)
    log_probs[..., head.blank] = 5.0
    soft, soft_lens = model.ctc_soft_speech(log_probs, torch.tensor([5, 3]), head)
    assert soft_lens.tolist() == [1, 1]
    mean = log_probs[1, :3, :6].softmax(-1).mean(0)
    torch.testing.assert_close(soft[1, 0], mean @ head.table)


def test_gradients_of_soft_speech_are_those_of_its_formula():
    head, _ = tied_head()
    head.rows = head.rows.double()
    scores = (3 * torch.randn(2, 5, 7)).double().requires_grad_(True)

    def soft(x):
        return model.ctc_soft_speech(x.log_softmax(-1), torch.tensor([5, 3]), head)[0]

    assert torch.autograd.gradcheck(soft, scores)
    soft(scores).sum().backward()
    assert (scores.grad[1, 3:] == 0).all(), "padding got a gradient"


@pytest.mark.parametrize("speech", ["frames", "ctc"])
def test_speech_for_llm_is_adaptor_frames_or_soft_speech(speech):
    head, adaptor, (enc, lens) = tied_head()[0], small_adaptor(output_dim=8, stack=2), batch()
    emb, emb_lens = adaptor(enc, lens)
    heard, heard_lens, log_probs, positions = model.speech_for_llm(adaptor, head, enc, lens, speech)
    expected = (emb, emb_lens) if speech == "frames" else model.ctc_soft_speech(head(emb), emb_lens, head)
    assert torch.equal(heard, expected[0]) and torch.equal(heard_lens, expected[1])
    assert torch.equal(log_probs, head(emb)) and torch.equal(positions, emb_lens)


def test_speech_for_llm_without_a_head_has_no_log_probabilities():
    adaptor, (enc, lens) = small_adaptor(), batch()
    heard, heard_lens, log_probs, _ = model.speech_for_llm(adaptor, None, enc, lens, "frames")
    assert torch.equal(heard, adaptor(enc, lens)[0]) and heard_lens.tolist() == [9, 5] and log_probs is None


def test_log_probabilities_stay_fp32_under_autocast():
    head, adaptor, (enc, lens) = tied_head()[0], small_adaptor(output_dim=8), batch()
    with torch.autocast("cpu", torch.bfloat16):
        _, _, log_probs, _ = model.speech_for_llm(adaptor, head, enc, lens, "ctc")
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 9), atol=1e-5, rtol=0)


# ---- loading weights --------------------------------------------------------------------------------------------


class Opener:
    """A pickle that would run code when it is loaded."""

    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def test_weights_round_trip(tmp_path):
    adaptor, other = small_adaptor(), model.AudioAdaptor(**SMALL)
    torch.save(adaptor.state_dict(), tmp_path / "a.pt")
    model.load_weights(other, tmp_path / "a.pt")
    assert all(torch.equal(v, adaptor.state_dict()[k]) for k, v in other.state_dict().items())


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"torn"), "not a plain state dict"),
        (lambda path: torch.save({"x": Opener()}, path), "not a plain state dict"),
        (lambda path: torch.save(small_adaptor(hidden_dim=8).state_dict(), path), "does not fit .* AudioAdaptor"),
        (lambda path: torch.save(small_adaptor(num_layers=1).state_dict(), path), "transformer.layers.1"),
        (lambda path: torch.save({}, path), "input_proj.weight"),
    ],
    ids=["missing", "torn", "code", "another width", "missing layer", "empty"],
)
def test_weights_that_do_not_fit_are_refused_with_the_files_name(tmp_path, write, message, capsys):
    write(tmp_path / "w.pt")
    with pytest.raises(ValueError, match=message) as error:
        model.load_weights(small_adaptor(), tmp_path / "w.pt")
    assert "w.pt" in str(error.value) and "code from" not in capsys.readouterr().out


# ---- SpecAugLFR -------------------------------------------------------------------------------------------------

DRAWS = 2000


def specaug(**kwargs):
    return model.SpecAugLFR(**({"apply_time_warp": False, "lfr_rate": 6, "time_mask_width_range": (0, 12)} | kwargs))


def masks(augment, frames=40, draws=DRAWS):
    """Many independent masked clips (one a batch, so that FunASR's batch-wide bound is the clip's own)."""
    return torch.stack([augment(torch.ones(1, frames, 560), torch.tensor([frames]))[0][0] == 0 for _ in range(draws)])


@pytest.mark.parametrize(
    "only",
    [{"apply_time_mask": False}, {"apply_freq_mask": False},
     {"apply_freq_mask": False, "time_mask_width_range": None, "time_mask_width_ratio_range": (0.05, 0.4)},
     {"apply_time_mask": False, "freq_mask_width_range": 30, "num_freq_mask": 1}],
    ids=["bins", "frames", "ratio of frames", "one mask of bins"],
)  # fmt: skip
def test_masks_have_funasrs_distribution(only):
    from funasr.models.specaug.specaug import SpecAugLFR

    kwargs = {"apply_time_warp": False, "lfr_rate": 6, "time_mask_width_range": (0, 12)} | only
    axis = 1 if only.get("apply_time_mask") is False else 2  # the axis on which the mask is constant
    ours, theirs = (masks(kind(**kwargs).train()).any(axis).float() for kind in (model.SpecAugLFR, SpecAugLFR))
    share, their_share = ours.mean(1), theirs.mean(1)
    assert share.mean().item() == pytest.approx(their_share.mean().item(), abs=0.01)
    assert share.std().item() == pytest.approx(their_share.std().item(), abs=0.01)
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.05, rtol=0)  # how often each bin is hidden


def test_a_single_number_is_a_range_from_zero_upper_bound_excluded():
    assert not masks(specaug(apply_time_mask=False, freq_mask_width_range=1).train(), draws=50).any()
    hidden = masks(specaug(apply_time_mask=False, freq_mask_width_range=2, num_freq_mask=1).train(), draws=100)
    assert {int(row[0, :80].sum()) for row in hidden} == {0, 1}


def test_the_same_bins_are_hidden_in_all_seven_stacked_frames():
    hidden = masks(specaug(apply_time_mask=False).train(), draws=50).unflatten(-1, (7, 80))
    assert hidden.any()
    assert (hidden == hidden[:, :1, :1]).all()


def test_time_masks_stay_within_each_utterance(rng):
    augment = specaug(apply_freq_mask=False, num_time_mask=1, time_mask_width_range=(5, 6)).train()
    lens, starts = torch.tensor([40, 10]), set()
    for _ in range(200):
        out, _ = augment(torch.ones(2, 40, 7), lens, rng)
        hidden = (out[1, :, 0] == 0).nonzero().flatten()
        assert len(hidden) == 5 and int(hidden.max()) < 10
        starts.add(int(hidden.min()))
    assert starts == set(range(5)), "every place within the short utterance is used"


def test_max_ratio_caps_each_time_mask(rng):
    augment = specaug(apply_freq_mask=False, num_time_mask=1, time_mask_width_range=(0, 50), time_mask_max_ratio=0.1)
    augment.train()
    longest = {60: 0, 17: 0, 8: 0}
    for _ in range(300):
        out, _ = augment(torch.ones(3, 60, 7), torch.tensor(list(longest)), rng)
        for row, n in zip(out, longest):
            longest[n] = max(longest[n], int((row[:, 0] == 0).sum()))
    assert longest == {60: 6, 17: 1, 8: 0}


def test_time_mask_wider_than_the_utterance_leaves_the_padding_alone(rng):
    augment = specaug(apply_freq_mask=False, time_mask_width_range=(30, 31)).train()
    out, _ = augment(torch.ones(2, 40, 7), torch.tensor([40, 10]), rng)
    assert (out[1, 10:] == 1).all()


def test_eval_mode_changes_nothing():
    feats, lens = torch.randn(2, 30, 560), torch.tensor([30, 12])
    out, out_lens = model.SpecAugLFR(lfr_rate=6, time_mask_width_range=(0, 10)).eval()(feats, lens)
    assert torch.equal(out, feats) and torch.equal(out_lens, lens)


@pytest.mark.parametrize("warp", [False, True])
def test_input_is_not_modified_and_the_generator_decides(warp):
    augment = model.SpecAugLFR(apply_time_warp=warp, lfr_rate=6, time_mask_width_range=(1, 10)).train()
    feats, lens = torch.randn(2, 30, 560), torch.tensor([30, 12])
    before = feats.clone()
    first, again, other = (augment(feats, lens, torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert torch.equal(feats, before)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_time_warp_equals_funasrs_for_the_same_draw(monkeypatch):
    from funasr.models.specaug.time_warp import time_warp

    augment = specaug(apply_time_warp=True, apply_freq_mask=False, apply_time_mask=False).train()
    feats = torch.randn(1, 30, 560)
    draws = {}

    def drawn(low, high, size, generator=None):
        """Both sides draw first a centre, then a place near it; give both the same numbers."""
        return torch.tensor([draws.setdefault((int(low), int(high)), int(low) + (int(high) - int(low)) // 3)])

    monkeypatch.setattr(torch, "randint", drawn)
    expected = time_warp(feats.clone(), window=5)
    warped, _ = augment(feats, torch.tensor([30]))
    torch.testing.assert_close(warped, expected)
    assert not torch.allclose(warped, feats)


def test_time_warp_leaves_padding_and_short_clips_alone(rng):
    augment = specaug(apply_time_warp=True, apply_freq_mask=False, apply_time_mask=False).train()
    feats, lens = torch.randn(2, 30, 560), torch.tensor([20, 10])
    out, _ = augment(feats, lens, rng)
    assert torch.equal(out[0, 20:], feats[0, 20:]) and not torch.equal(out[0, :20], feats[0, :20])
    assert torch.equal(out[1], feats[1])  # 10 frames leave no room for a window of 5 on both sides


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"time_mask_width_range": (0, 5), "time_mask_width_ratio_range": (0.0, 0.1)},
     {"time_mask_width_range": (5, 5)}, {"time_mask_width_range": (0, 5), "freq_mask_width_range": (9, 3)}],
)  # fmt: skip
def test_ranges_that_make_no_sense_are_refused(kwargs):
    with pytest.raises(ValueError, match="SpecAugLFR"):
        model.SpecAugLFR(**kwargs)
