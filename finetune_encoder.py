"""Adapt Fun-ASR-Nano's encoder to telephone speech, by FunASR's own keys; errors before and after.

    python finetune_encoder.py configs/stage1.yaml [key=value ...]          # ++key=value works too
    python finetune_encoder.py configs/telephone_8k.yaml configs/telephone_8k_from_hub.yaml
    torchrun --nproc_per_node 4 finetune_encoder.py configs/stage1.yaml
    python finetune_encoder.py configs/stage1.yaml --check                  # all but the training
    python finetune_encoder.py merge runs/stage1 Fun-ASR-Nano-2512/model.pt -o merged/ [--to hf]

Loss    llm_weight x cross-entropy of the transcript through the LLM, smoothed by lsm_weight
        + ctc_weight x CTC, which reaches the encoder unless detach_ctc_decoder
        + distill_weight x squared distance of what the encoder hears on the simulated line to what
          the encoder that the run began with hears of the same speech, clean;
        each summed over the step of all processes and divided by its labels (or frames)
Input   the released folder (model.pt, multilingual.tiktoken, Qwen3-0.6B/); or a Whisper, which
        gets a CTC head over characters or words; or transformers' folder of Fun-ASR-Nano, which
        has no CTC branch; or a run.dir of train_phase2.py on Whisper, whose adaptor, CTC head and
        LoRA go on. Manifests, or FunASR's .list of .jsonl files
Output  output_dir/trained.pt (what has changed: the better of the best checkpoint and the average)
        and config.json, for infer.py and `merge`; step-*.pt, avg.pt, last.pt to resume; table.md,
        results.json, worst.txt, curves.png, dropped.jsonl; metrics.jsonl and TensorBoard events
Papers  SpecAugment 1904.08779, CTC (Graves 2006), packet loss as a Markov chain (Gilbert 1960)
Source  layers, and what keys are called and mean: funasr 1.4.16. It parses ctc_weight, lsm_weight,
        detach_ctc_decoder and specaug, but trains on the plain cross-entropy alone.
Logged  ce (nats per label token), acc, ctc (nats per CTC label), distill (squared distance per
        frame and dimension), impossible (clips with more CTC labels than frames), dropped (clips
        that cannot be read), lr, grad_norm (mean), audio_s_per_s, gpu_gib; of validation sets
        SET_llm_er and SET_ctc_er (WER, or CER for Chinese), SET_ce, SET_ctc, SET_distill
"""

import base64
import contextlib
import copy
import functools
import importlib
import io
import itertools
import json
import math
import random
import re
import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
from omegaconf import OmegaConf
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import model

DEFAULTS = """
# The release's values. A key marked + is not FunASR's, - changes nothing, = has only this value.
# `<<: {...}`, YAML's merge key, puts its keys into the section around it: several on one line.
model: FunASRNano        # hub name or folder of the whole model, where init_param is null
init_param: null         # model.pt, its folder, or + transformers', or a run folder to go on from,
                         # of this script or of train_phase2.py
model_conf:
  lsm_weight: 0.1        # label smoothing of the cross-entropy
  length_normalized_loss: true  # losses per label; false: per clip
audio_encoder: SenseVoiceEncoderSmall  # + or a Whisper, by hub name or folder
audio_encoder_conf:
  <<: {output_size: 512, attention_heads: 4, linear_units: 2048, num_blocks: 50, tp_blocks: 20}
  <<: {kernel_size: 11, dropout_rate: 0.1, attention_dropout_rate: 0.1}
  freeze: true
  freeze_layer_num: -1   # > 0: so many blocks from below stay frozen
  <<: {positional_dropout_rate: 0.1, feat_permute: true}  # - FunASR's encoder reads neither
  <<: {input_layer: pe, pos_enc_class: SinusoidalPositionEncoder, normalize_before: true}  # =
  <<: {sanm_shfit: 0, selfattention_layer_type: sanm}  # =
llm: Qwen3-0.6b          # none: no LLM in memory, CTC and distillation only
llm_conf:
  freeze: true
  llm_dtype: bf16        # or fp32; of a frozen LLM on a GPU, all else is fp32
  init_param_path: Qwen3-0.6B    # folder of its configuration, beside model.pt
  hub: hf                # - the LLM's files lie in the model's own folder
  use_lora: false        # beside a frozen LLM
  lora_conf:
    <<: {r: 16, lora_alpha: 32, lora_dropout: 0.05, target_modules: [q_proj, v_proj]}
    <<: {freeze_lora: true, task_type: CAUSAL_LM}  # - use_lora decides; a causal LLM it is
    <<: {bias: none, init_param_path: null}  # =
llm_weight: 1.0          # +
audio_adaptor_conf:
  <<: {downsample_rate: 1, encoder_dim: 512, llm_dim: 1024, ffn_dim: 2048, n_layer: 2}
  <<: {use_low_frame_rate: true, freeze: true}
ctc_decoder_conf:
  <<: {downsample_rate: 1, encoder_dim: 512, llm_dim: 512, ffn_dim: 2048, n_layer: 5}
  freeze: false          # decoder and head
detach_ctc_decoder: true # CTC trains its own branch and never reaches the encoder
ctc_weight: 1.0
ctc_conf:
  dropout_rate: 0.0
  ctc_type: builtin      # =
  <<: {reduce: true, ignore_nan_grad: true}  # - summed over the step; a NaN stops the run
distill_weight: 0.0      # +
feature_noise: 0.0       # + of what the LLM hears in training, standard deviation
frontend_conf:
  fs: 16000              # or 8000, for telephone speech as it is; other rates are resampled
  mel_axis: pretrained   # + at 8000: pretrained, or native, FunASR's warped one
  dither: 1.0            # + FunASR's default, in inference too
  cmvn_file: null
  <<: {window: hamming, n_mels: 80, frame_length: 25, frame_shift: 10, lfr_m: 7, lfr_n: 6}  # =
specaug: ""              # or SpecAugLFR
specaug_conf:            # time masks count feature frames: 60 ms, with Whisper 10 ms
  <<: {apply_freq_mask: true, freq_mask_width_range: [0, 20], num_freq_mask: 2, lfr_rate: 6}
  <<: {apply_time_mask: true, time_mask_width_range: [0, 10], num_time_mask: 2}
  time_mask_max_ratio: 0.1  # + no time mask is longer than this share of its clip
  fill: mean             # + the clip's mean, or zero as in FunASR, which is below any silence
  apply_time_warp: false # =
  time_warp_window: 5    # - there is no time warp
telephone_conf:          # + the simulated line
  data_set_list: []      # clean speech that always goes through it
  silence_share: 0.0     # of an epoch: clips in which nobody speaks, made up or cut out of calls
  silence_clips: 40      # such clips to be scored, every other one with 10 hotwords shown
  prob: 0.0              # share of train_data_set_list's clips that go through it too
  band_prob: 1.0         # 300-3400 Hz
  <<: {noise_prob: 0.5, snr_db: [5.0, 30.0]}  # white noise
  <<: {level_prob: 1.0, level_db: [-30.0, 0.0]}  # peak, dBFS
  <<: {codec_prob: 1.0, codecs: [mulaw, alaw, gsm]}  # one of them is drawn
  <<: {packet_loss_prob: 0.5, packet_loss_rate: [0.01, 0.05]}  # of 20 ms packets
  packet_loss_burst: 2.0 # packets lost in a row, on average
data_mix: 0.0            # + share of an epoch that is clean rehearsal
train_conf:
  <<: {accum_grad: 1, max_epoch: 2, keep_nbest_models: 200, avg_nbest_model: 100}
  grad_clip: 5.0         # of the gradient's norm; 0: off
  max_steps: 0           # + > 0: exactly so many, whatever max_epoch says
  log_interval: 100      # steps; 0: never, as of the next two
  <<: {validate_interval: 2000, save_checkpoint_interval: 2000}  # also when an epoch ends
  early_stopping_patience: 0  # > 0: stop after so many validations without a better score
  valid_clips: 200       # + clips of each set that are scored and decoded; at the end all
  <<: {use_bf16: false, resume: true}
  use_deepspeed: false   # = true in the release; several GPUs: torchrun; memory: use_bf16
  deepspeed_config: null # - DeepSpeed is not used
  use_lora: false        # - llm_conf.use_lora decides
  <<: {save_init_model: false, effective_save_name_excludes: [llm.]}  # - what changed is saved
optim_conf:
  lr: 5.0e-6             # peak
  ctc_lr: 0.0            # + of CTC decoder and head; 0: as lr
  layer_decay: 1.0       # + rate of an encoder block over that of the one above it
  weight_decay: 0.0      # not on norms and biases
  betas: [0.9, 0.999]
scheduler_conf: {warmup_steps: 2500}
dataset_conf:            # lengths are 10 ms frames of audio and text tokens
  batch_type: token      # token (frames + text), length (frames) or example
  batch_size: 6000       # of that unit, padding included, per process
  batch_size_sample_max: 10     # clips of a batch
  batch_size_token_max: 6000    # LLM positions of a batch, padding included
  max_token_length: 3500 # longer clips are counted and named, as of the next three
  <<: {max_source_length: 12000, min_source_length: 10, max_target_length: 2048}
  num_workers: 4
  retry: 2000            # stop when more clips than this cannot be read
  empty_targets: keep    # + clips without a text: keep, nobody speaks in them, or drop
  strip_tags: false      # + take tags such as <|zh|> out of targets
  speed_perturb: [1.0]   # + factors, of which one is drawn for a training clip
  ctc_tokenizer: SenseVoiceTokenizer  # + char or word, with Whisper
  ctc_target_normalize: true    # lower case, no punctuation
  ctc_tokenizer_conf:
    vocab_path: null     # null: multilingual.tiktoken beside model.pt
    <<: {is_multilingual: true, num_languages: 8749}  # - special tokens are no targets
  prompt_classes: MultiContextPrompt  # - the prompt is that of inference; FunASR's is another
  prompt_conf:
    <<: {use_hotwords: true, use_asr_hotwords: true}  # those of a clip's fields of these names
    itn: true            # + false asks for numbers as they are spoken, as FunASR's inference does
    <<: {use_hist: false, use_one_pass_result: true}  # - inference has none
    <<: {min_neg_hotwords_num: 0, max_neg_hotwords_num: 0}  # drawn for a training clip, not said
    <<: {chinese_hotwords_list: null, english_hotwords_list: null}  # files; null: other clips' own
  <<: {index_ds: FunASR, shuffle: true}  # =
  batch_sampler: BatchSampler   # - FunASR maps every name to one sampler; batch_type decides
  sort_size: 1024        # - pools of like clips are as large as keeps the padding small
  data_split_num: 256    # - an epoch is one pass; FunASR makes so many over one .jsonl
  audio_encoder_downsample_rate: 6  # - FunASR reads it nowhere; a frame has 60 ms
  audio_adaptor_downsample_rate: ${audio_adaptor_conf.downsample_rate}  # - the adaptor's decides
  <<: {batch_size_scale_ratio_max: 2.0, batch_size_scale_threshold: 3000}  # - FunASR reads neither
  use_dynamic_output_ratio: 0.0     # - FunASR reads it and does nothing with it
<<: {audio_adaptor: Transformer, ctc_decoder: Transformer, frontend: WavFrontend, optim: adamw}  # =
<<: {scheduler: warmuplr, dataset: FunASR, tokenizer: HuggingfaceTokenizer}  # =
tokenizer_conf:
  init_param_path: ${llm_conf.init_param_path}  # - the tokenizer lies with the LLM's configuration
  unk_symbol: <unk>      # - a byte-level tokenizer knows every text; FunASR ignores the key
enable_tf32: true
debug: false             # - there is no debug mode
<<: {train_data_set_list: [], valid_data_set_list: []}  # telephone speech; commas between several
clean_data_set_list: []  # + clean rehearsal
clean_valid_data_set_list: []  # + scored as it is, and through the simulated line
output_dir: ???
<<: {seed: 0, device: auto}  # + auto, cpu or cuda
"""

SANM = "SenseVoiceEncoderSmall"
CTC = ("ctc_decoder", "ctc")  # the branch that Hugging Face's model.pt lacks
RENAMED = {  # the release's names of layers -> transformers'; hf_names has the encoder's blocks
    "audio_adaptor.linear": "model.multi_modal_projector.linear_",
    "audio_adaptor.blocks": "model.multi_modal_projector.layers",
    "llm.model": "model.language_model", "llm.lm_head": "lm_head",
    "linear_out": "o_proj", "linear_q.": "q_proj.", "linear_k.": "k_proj.", "linear_v.": "v_proj.",
    "fsmn_block": "fsmn.conv", "feed_forward.w_": "mlp.fc",
    "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
}  # fmt: skip
CODECS = {"mulaw": "ULAW", "alaw": "ALAW", "gsm": "GSM610"}  # libsndfile's names
NOT_NANO = "not transformers' fun_asr_nano (5.24), or audio_encoder_conf has other sizes"
SETS = ("telephone", "simulated", "clean")  # as it is, through the simulated line, clean speech
DISTRACTORS = (0, 10, 100)  # hotwords that are not said beside those that are, in validation
AGAIN = [f"hotwords{count}" for count in DISTRACTORS]  # kinds of clips, for read-outs alone
ONLY_DISTRACTORS = 0.2  # share of the training clips with hotwords that are shown only others
TONES = {  # Hz, and seconds on and off: of North America, and 450 Hz of China
    "dial": [(350, 440, 1, 0), (450, 450, 1, 0)], "busy": [(480, 620, 0.5, 0.5)] * 2,
    "ringback": [(440, 480, 2, 4), (450, 450, 1, 4)],
    "dtmf": [(a, b, 0.1, 0.1) for a in (697, 770, 852, 941) for b in (1209, 1336, 1477)],
}  # fmt: skip


def check(cfg, say, verbose):
    """Refuse what is not implemented or cannot work; say what changes nothing."""
    model.check_marked(cfg, DEFAULTS, say, verbose)
    line, start = cfg.telephone_conf, cfg.init_param or "none"
    if phase2 := read_phase2(read_run(start).get("base") or start):
        known = cfg.audio_encoder != SANM  # where the base's encoder lies now
        cfg.audio_encoder = cfg.audio_encoder if known else phase2["encoder"]["name"]
        cfg.dataset_conf.ctc_tokenizer = "llm"
        say("note: a base of train_phase2.py: its prompt, its speech, CTC over the LLM's tokens")
        if not cfg.llm_conf.freeze:
            raise model.UserError("llm_conf.freeze=false: on such a base LoRA trains; set true")
    tokenizers = ("SenseVoiceTokenizer",)
    if cfg.audio_encoder != SANM:
        tokenizers = ("llm",) if phase2 else ("char", "word")
        rest = "frontend_conf, llm_conf, audio_adaptor_conf and, but for freeze, audio_encoder_conf"
        say(f"note: a Whisper has its own front end and sizes; {rest} change nothing")
    for key, allowed in (
        ("llm", ("Qwen3-0.6b", "none")),
        ("llm_conf.llm_dtype", ("bf16", "fp32")),
        ("specaug", ("", "SpecAugLFR")),
        ("dataset_conf.batch_type", ("token", "length", "example")),
        ("dataset_conf.ctc_tokenizer", tokenizers),
        ("dataset_conf.empty_targets", ("keep", "drop")),
    ):
        model.one_of(allowed, cfg, key)
    if cfg.llm_conf.use_lora and not cfg.llm_conf.freeze:
        raise model.UserError("llm_conf.use_lora: LoRA trains beside a frozen LLM; set freeze=true")
    if not 0 <= min(cfg.data_mix, line.silence_share) <= max(
        cfg.data_mix, line.silence_share, *line.packet_loss_rate) < 1:  # fmt: skip
        names = "data_mix, telephone_conf.silence_share and telephone_conf.packet_loss_rate"
        raise model.UserError(f"{names} are shares below 1")
    prompts = cfg.dataset_conf.prompt_conf
    if prompts.min_neg_hotwords_num > prompts.max_neg_hotwords_num:
        raise model.UserError("prompt_conf: min_neg_hotwords_num is over max_neg_hotwords_num")
    if verbose:
        say("expect, as the guide says: a first loss of 2 to 3, 30 to 50 % lower at the end, the "
            "best epoch between 5 and 15")  # fmt: skip
    if unknown := set(line.codecs) - set(CODECS):
        raise model.UserError(f"telephone_conf.codecs: {min(unknown)} is none of {list(CODECS)}")
    for minimum, section, names in (
        (1, "train_conf", "accum_grad max_epoch keep_nbest_models avg_nbest_model"),
        (0, "train_conf", "grad_clip log_interval validate_interval save_checkpoint_interval"),
        (1, "dataset_conf", "batch_size batch_size_sample_max batch_size_token_max"),
        (1, "telephone_conf", "packet_loss_burst"),
        (0, "telephone_conf", "silence_clips"),
    ):
        model.at_least(minimum, cfg, *(f"{section}.{name}" for name in names.split()))


# ---- the simulated telephone line -------------------------------------------


def simulate_telephone(wave, conf, rng):
    """Clean speech at 8 kHz through a telephone line: noise, band, level, codec, lost packets.

    Each effect has its probability in telephone_conf; `rng` (random.Random) decides everything.
    wave (N,) -> (N,), not delayed, so that frames of both lie on each other.
    """
    if rng.random() < conf.noise_prob:  # before the band: it is the room's, not the line's
        gain = wave.std() * 10 ** (-rng.uniform(*conf.snr_db) / 20)
        noise = np.random.default_rng(rng.getrandbits(63)).standard_normal(len(wave))
        wave = wave + gain * torch.from_numpy(noise).float()
    if rng.random() < conf.band_prob:
        wave = torchaudio.functional.highpass_biquad(wave, 8000, 300.0)
        wave = torchaudio.functional.lowpass_biquad(wave, 8000, 3400.0)
    if rng.random() < conf.level_prob:
        peak = 10 ** (rng.uniform(*conf.level_db) / 20)
        wave = wave / wave.abs().max().clamp(min=1e-5) * peak
    if rng.random() < conf.codec_prob:
        file, codec = io.BytesIO(), CODECS[rng.choice(list(conf.codecs))]
        soundfile.write(file, wave.clamp(-1, 1).numpy(), 8000, format="WAV", subtype=codec)
        file.seek(0)
        decoded = torch.from_numpy(soundfile.read(file, dtype="float32")[0])
        missing = max(0, len(wave) - len(decoded))  # GSM has blocks of 20 ms
        wave = F.pad(decoded, (0, missing))[: len(wave)]
    if rng.random() < conf.packet_loss_prob:
        rate = rng.uniform(*conf.packet_loss_rate)
        wave = lose_packets(wave, rate, conf.packet_loss_burst, rng)
    return wave


def lose_packets(wave, rate, burst, rng):
    """Silence 20 ms packets by a two-state chain: `rate` of them, `burst` in a row on average."""
    lost, wave = rng.random() < rate, wave.clone()
    for first in range(0, len(wave), 160):
        if lost:
            wave[first : first + 160] = 0.0
        lost = rng.random() < (1 - 1 / burst if lost else rate / (1 - rate) / burst)
    return wave


def make_silence(seconds, rng):
    """Nobody speaks, at 8 kHz: (N,). Digital silence, noises, the network's tones, clicks."""
    kind = rng.choice(["digital", "comfort", "room", "clicks", *TONES])
    count, loud = round(8000 * seconds), 10 ** (rng.uniform(-50, -20) / 20)
    noise = np.random.default_rng(rng.getrandbits(63)).standard_normal(count)
    noise = torch.from_numpy(noise).float()
    if kind in ("digital", "comfort"):
        return noise * (kind == "comfort") * 10 ** (rng.uniform(-75, -55) / 20)
    if kind == "room":
        return torchaudio.functional.lowpass_biquad(noise, 8000, rng.uniform(200, 1500)) * loud
    if kind == "clicks":
        return noise * (noise.abs() > rng.uniform(3.0, 3.8)) * loud
    low, high, on, off = rng.choice(TONES[kind])
    time_s = torch.arange(count) / 8000
    tone = (2 * math.pi * low * time_s).sin() + (2 * math.pi * high * time_s).sin()
    return tone / 2 * loud * (time_s % (on + off) < on) + noise * 1e-3 * loud


def longest_pause(wave, rate):
    """The longest stretch of a call, 0.2 s at least, in which silero-vad hears nobody, or None.

    Where it hears nobody at all it is not believed: the call may be a faint one.
    """
    edges = [0, *itertools.chain(*model.hear_speech(wave, rate)), len(wave)]
    first, last = max(zip(edges[::2], edges[1::2], strict=True), key=lambda pair: pair[1] - pair[0])
    return wave[first:last] if len(edges) > 2 and last - first >= 0.2 * rate else None


# ---- Fun-ASR-Nano: front end, tokenizers, layers, prompt --------------------


def telephone_fbank(wave, key="", dither=1.0):
    """Log-mel of 8 kHz speech on the mel axis of a 16 kHz front end: (N,) -> (T, 80), 10 ms each.

    FunASR at `fs: 8000` spreads its 80 bins over 0-4 kHz, an axis that the encoder has never seen.
    But 256 points at 8 kHz have the bins of 512 points at 16 kHz, so the same filters apply after
    a gain for each bin: the ratio of the pre-emphases and the square of that of the window sums.
    Above 4 kHz an upsampled clip has its dither, so noise of the dither's power is drawn.
    Departs from upsampling in the lowest bins (DC removal), above 3.8 kHz (the resampler's slope)
    and, without dither, above 4 kHz, where the other path has what leaks through its window.
    """
    if len(wave) < 200:
        raise model.AudioError(f"{len(wave) / 8000:.3f} s is shorter than one 25 ms window")
    kaldi, hz = torchaudio.compliance.kaldi, torch.arange(256) * 31.25
    settings = {"sample_frequency": 8000.0, "window_type": "hamming"}
    settings["dither"] = dither * 0.5**0.5  # at half the rate half the variance is as much a Hz
    narrow, wide = (torch.hamming_window(n, periodic=False) for n in (200, 400))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(model.hash_text(key)[:15], 16))
        power = kaldi.spectrogram(wave.float()[None] * 32768, **settings).exp()  # (T, 129)
        uniform = torch.rand(len(power), 127)

    def pre_emphasis(rate):
        return 1 + 0.97**2 - 2 * 0.97 * torch.cos(2 * math.pi * hz / rate)  # |1 - 0.97 z^-1|^2

    gain = pre_emphasis(16000) / pre_emphasis(8000) * (wide.sum() / narrow.sum()) ** 2
    level = dither**2 * (wide**2).sum() * pre_emphasis(16000)
    noise = level[129:] * -uniform.clamp(min=1e-30).log()  # power of Gaussian noise
    filters, _ = kaldi.get_mel_banks(80, 512, 16000.0, 20.0, 0.0, 100.0, -500.0, 1.0)  # (80, 256)
    energies = torch.cat([power * gain[:129], noise], dim=1) @ filters.T  # (T, 80)
    return energies.clamp(min=torch.finfo(torch.float32).eps).log()


class NanoFrontend:
    """Audio to features of Fun-ASR-Nano, 60 ms a frame: (N,) at sample_rate -> (T, 560).

    fs 16000: as FunASR. fs 8000: on the `pretrained` mel axis (telephone_fbank), or on FunASR's
    own warped one (`native`), about 1 nat off what the released encoder was trained on.
    """

    frame_ms = 60.0

    def __init__(self, fs=16000, mel_axis="native", dither=1.0, cmvn_file=None, **_):
        if fs not in (8000, 16000) or mel_axis not in ("pretrained", "native"):
            said = f"got fs={fs}, mel_axis={mel_axis}"
            raise model.UserError(f"frontend_conf: 8000 or 16000, pretrained or native; {said}")
        self.sample_rate, self.mel_axis, self.dither = fs, mel_axis, dither
        self.cmvn = model.load_cmvn(cmvn_file) if cmvn_file else None

    def features(self, wave, key=""):
        if self.sample_rate == 8000 and self.mel_axis == "pretrained":
            feats = telephone_fbank(wave, key, self.dither)
        else:
            feats = model.kaldi_fbank(wave, self.sample_rate, key, self.dither)
        feats = model.apply_lfr(feats)
        return feats if self.cmvn is None else (feats + self.cmvn[0]) * self.cmvn[1]

    def out_lens(self, lens):
        return lens


class SenseVoiceTokenizer:
    """multilingual.tiktoken: text <-> CTC classes; special tokens are no targets, never read."""

    symbols, specials = None, 1679  # special tokens stand behind the ranks

    def __init__(self, path):
        import tiktoken

        if not Path(path).is_file():
            raise model.UserError(f"{path}: no such file; CTC needs it, ModelScope has it")
        lines = [line.split() for line in Path(path).read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        rest = {"mergeable_ranks": ranks, "special_tokens": {}}
        self.coder = tiktoken.Encoding("multilingual", pat_str=pattern, **rest)
        self.ranks, self.classes = len(ranks), len(ranks) + self.specials

    def encode(self, text):
        return self.coder.encode_ordinary(text)

    def decode(self, classes):
        return self.coder.decode([c for c in classes if c < self.ranks])


class SymbolTokenizer:
    """Characters or words as CTC classes, for an encoder without a head of its own."""

    def __init__(self, kind, texts, symbols):
        self.split, self.joint = (list, "") if kind == "char" else (str.split, " ")
        self.symbols = symbols or sorted({s for text in texts for s in self.split(text)})
        self.class_of = {symbol: number for number, symbol in enumerate(self.symbols)}
        self.classes = len(self.symbols)

    def encode(self, text):
        """Classes of the symbols that the training transcripts had; others are left out."""
        return [self.class_of[s] for s in self.split(text) if s in self.class_of]

    def decode(self, classes):
        return self.joint.join(self.symbols[c] for c in classes)


class FunASRBlock(nn.Module):
    """Pre-norm attention and feed-forward, under the names of FunASR."""

    def __init__(self, size, heads=8):
        super().__init__()
        names, self.heads = ("linear_q", "linear_k", "linear_v", "linear_out"), heads
        self.self_attn = nn.ModuleDict({name: nn.Linear(size, size) for name in names})
        self.feed_forward = model.SANMFeedForward(size, size // 4, 0.0)
        self.norm1, self.norm2 = (nn.LayerNorm(size, eps=1e-12) for _ in range(2))

    def forward(self, x, mask):  # x (B, T, D), mask (B, T)
        *linears, linear_out = self.self_attn.values()
        projected = [linear(self.norm1(x)) for linear in linears]
        split = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in projected]
        attended = F.scaled_dot_product_attention(*split, attn_mask=mask[:, None, None])
        x = x + linear_out(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm2(x))


class FunASRTransformer(nn.Module):
    """FunASR's `Transformer`, adaptor and CTC decoder of the release: Linear-ReLU-Linear, blocks.

    Input   x (B, T, encoder_dim), lens (B,) on the CPU.
    Output  (B, ceil(T / k), llm_dim), lens (B,); k = downsample_rate. Rows past lens mean nothing;
            padding, even NaN, never reaches a real one.
    """

    def __init__(
        self, downsample_rate=1, encoder_dim=512, llm_dim=1024, ffn_dim=2048, n_layer=2, **_
    ):
        super().__init__()  # FunASR's sections have more keys, such as freeze
        self.stack, self.width = downsample_rate, llm_dim
        self.linear1 = nn.Linear(encoder_dim * downsample_rate, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, llm_dim)
        self.blocks = nn.ModuleList([FunASRBlock(llm_dim) for _ in range(n_layer)])

    def forward(self, x, lens):
        x = x.masked_fill(~model.length_mask(lens, x.shape[1], x.device)[..., None], 0.0)
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.stack))
        x = x.reshape(len(x), -1, x.shape[2] * self.stack)  # (B, ceil(T/k), k * encoder_dim)
        x = self.linear2(F.relu(self.linear1(x)))  # (B, ceil(T/k), llm_dim)
        lens = (lens - 1) // self.stack + 1
        mask = model.length_mask(lens, x.shape[1], x.device)
        for block in self.blocks:
            x = block(x, mask)
        return x, lens


class CTCOutput(nn.Module):
    """FunASR's CTC head `ctc.ctc_lo`: one Linear over the vocabulary, the blank last."""

    def __init__(self, width, classes, dropout_rate=0.0, **_):
        super().__init__()
        self.ctc_lo, self.blank = nn.Linear(width, classes + 1), classes
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # in bf16 they would be off by 1 %
            return self.ctc_lo(self.dropout(x.float())).log_softmax(-1)


def llm_positions(frames):
    """How many adaptor frames the LLM sees, about T / 8: 480 ms a position.

    FunASR's `use_low_frame_rate` pools nothing. The adaptor keeps all T frames and the LLM gets the
    first n, into which encoder and adaptor have learned to pack the clip.
    """
    for _ in range(3):  # as three convolutions of stride 2 would leave
        frames = (frames - 1) // 2 + 1
    return frames


class FunASRNano(nn.Module):
    """Fun-ASR-Nano: encoder, adaptor, Qwen3; beside them a CTC decoder and its head. 868.9 M.

    Any part but the encoder may be None. Names of the state dict are the release's.
    Source  funasr's model of that name, equal to it within 1e-4.
    """

    ctc_through = ()  # what CTC's loss reaches besides its own branch and the encoder

    def __init__(self, encoder, adaptor=None, llm=None, ctc_decoder=None, ctc=None, low_rate=True):
        super().__init__()
        self.audio_encoder, self.audio_adaptor, self.llm = encoder, adaptor, llm
        self.ctc_decoder, self.ctc, self.low_rate = ctc_decoder, ctc, low_rate

    def blocks(self):
        """Blocks of the encoder, from input to output."""
        stacks = [part for part in self.audio_encoder.modules() if isinstance(part, nn.ModuleList)]
        return [block for stack in stacks for block in stack]

    def encode(self, feats, lens):
        """(B, T, F) -> enc (B, T', W) fp32, lens (B,)."""
        enc, lens = self.audio_encoder(feats, lens)
        return enc.float(), lens

    def listen(self, enc, lens):
        """What the LLM hears of it: (B, n, D), (B,)."""
        emb, emb_lens = self.audio_adaptor(enc, lens)
        heard = llm_positions(lens) if self.low_rate else emb_lens
        return emb[:, : int(heard.max())], heard

    def ctc_log_probs(self, enc, lens):
        """(B, T, W) -> log-probabilities (B, T, V + 1) fp32, lens; the blank is the last class."""
        if self.ctc_decoder is not None:
            enc, lens = self.ctc_decoder(enc, lens)
        return self.ctc(enc), lens

    def hear(self, enc, lens):
        """enc, lens -> model.Heard, None where the part is missing."""
        speech = (None, None) if self.llm is None else self.listen(enc, lens)
        heard = model.Heard(*speech, lens)
        if self.ctc is not None:
            heard.log_probs, heard.lens = self.ctc_log_probs(enc, lens)
            best = heard.log_probs.argmax(-1).cpu()
            heard.paths = model.ctc_paths(best, heard.lens, self.ctc.blank)
        return heard

    def prompt(self, tokenizer, *asked):
        """Token ids before and after the speech, of what row_prompt gives."""
        return nano_prompt(tokenizer, *asked)

    def label_ids(self, tokenizer, text):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def stop_id(self, tokenizer):
        return tokenizer.convert_tokens_to_ids("<|im_end|>")

    def most_positions(self, frames):
        """LLM positions of a clip of so many 10 ms frames, at most."""
        return llm_positions(-(-frames // model.LFR_N))

    def caps(self, heard, clips):
        """Most tokens of each answer."""
        return [model.token_cap(clip.seconds) for clip in clips]


class AdaptedLLM(FunASRNano):
    """What train_phase2.py made, under the same face: AudioAdaptor, a CTC head (or None) over the
    LLM's tokens, LoRA. Prompt, speech and labels are those that it was trained with."""

    ctc_through = ("audio_adaptor",)

    def __init__(self, encoder, adaptor, llm, ctc, settings):
        super().__init__(encoder, adaptor, llm, ctc=ctc)
        self.settings = settings  # `llm` of train_phase2.py's configuration, and normalize

    def listen(self, enc, lens):
        rest = enc, lens, self.settings["speech"]
        heard = model.hear(self.audio_adaptor, self.ctc, *rest, read_ctc=False)
        return heard.speech, heard.speech_lens

    def ctc_log_probs(self, enc, lens):  # a pass of its own: `enc` may be detached
        emb, lens = self.audio_adaptor(enc, lens)
        return self.ctc(emb), lens

    def hear(self, enc, lens):
        return model.hear(self.audio_adaptor, self.ctc, enc, lens, self.settings["speech"])

    def prompt(self, tokenizer, hotwords="", language="", instruction="", itn=True):
        text, system = instruction or self.settings["prompt"], self.settings["system"]
        return model.build_prompt(tokenizer, text, language, hotwords, system)

    def label_ids(self, tokenizer, text):
        text = model.normalize_text(text) if self.settings["normalize"] else text
        return model.text_to_ids(tokenizer, [text])[0]

    def stop_id(self, tokenizer):
        return model.end_of_turn(tokenizer)

    def most_positions(self, frames):
        samples = 160 * frames + 400  # and what a clip has beyond its last whole frame
        return int(self.audio_adaptor.out_lens(self.audio_encoder.num_frames(samples)))

    def caps(self, heard, clips):  # where the speech is CTC's, its count of tokens can be trusted
        by_ctc = self.settings["speech"] == "ctc"
        counts = map(len, heard.paths) if by_ctc else [None] * len(clips)
        pairs = zip(clips, counts, strict=True)
        return [model.token_cap(clip.seconds, ctc_tokens=count) for clip, count in pairs]


class TokenCoder:
    """Text <-> CTC classes of model.CTCHead; tokens that the head lacks are left out."""

    symbols = None

    def __init__(self, tokenizer, head):
        self.tokenizer, self.head = tokenizer, head

    def encode(self, text):
        return self.head.classes(model.text_to_ids(self.tokenizer, [text])[0])

    def decode(self, classes):
        return self.tokenizer.decode(self.head.tokens(classes))


CONTEXT = "请结合上下文信息，更加准确地完成语音转写任务。如果没有相关信息，我们会留空。\n\n\n"
CONTEXT += "**上下文信息：**\n\n\n"
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@functools.lru_cache(1024)
def nano_prompt(tokenizer, hotwords="", language="", instruction="", itn=True):
    """The prompt of FunASR's inference, as (before, after) token ids around the audio.

    FunASR trains with another header; here training and inference share this.
    """
    names = {"zh": "中文", "en": "英文", "ja": "日文", "auto": ""}  # as FunASR writes them
    text, language = "", names.get(language, language)
    if names := ", ".join(model.as_list(hotwords)):
        text = f"{CONTEXT}热词列表：[{names}]\n"
    asked = "语音转写" + f"成{language}" * bool(language) + "，不进行文本规整" * (not itn)
    text += instruction or f"{asked}："
    text = model.mark_special(tokenizer, text)
    halves = f"{SYSTEM}<|im_start|>user\n{text}", "<|im_end|>\n<|im_start|>assistant\n"
    return tuple(model.turn_to_ids(tokenizer, half) for half in halves)


def row_prompt(row, fields=("hotwords", "asr_hotwords"), itn=True):
    """Hotwords, language, instruction and itn of a manifest's row, as nano_prompt takes them."""
    hotwords = ", ".join(row[field] for field in fields if row.get(field))
    return hotwords, row.get("language") or "", row.get("prompt") or "", itn


# ---- loading ----------------------------------------------------------------


def read_run(folder):
    """config.json of a run folder of this script; {} for anything else."""
    if not (Path(folder) / "trained.pt").is_file():
        return {}
    run = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if run.get("format") != model.FORMAT or run.get("script") != "finetune_encoder":
        raise model.UserError(f"{folder}: made by an earlier layout, or by another script")
    return run


def read_phase2(folder):
    """config.json of a run folder of train_phase2.py; {} for anything else."""
    if not (Path(folder) / "adaptor_phase2_final.pt").is_file():
        return {}
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if config.get("format") != model.FORMAT or config.get("script") != "train_phase2":
        raise model.UserError(f"{folder}: not of train_phase2.py as it is now; train it again")
    return config


def load_adapted(parts, conf, llm_dtype, with_llm, config):
    """AdaptedLLM of a run folder of train_phase2.py; its LoRA goes on."""
    found = model.load_phase2(parts.base, config, llm_dtype, encoder_name=conf["audio_encoder"])
    encoder, adaptor, ctc, llm, tokenizer = found
    if not isinstance(encoder, model.WhisperEncoder):
        raise model.UserError(f"{parts.base}: only such a run on a Whisper goes on from audio")
    own = {name: p for name, p in llm.named_parameters() if "lora_" in name}
    for p in own.values():
        p.requires_grad_(True)
    own |= adaptor.state_dict() | (ctc.state_dict() if ctc is not None else {})
    hashes = [encoder.identity["weights"], llm.identity["weights"], model.hash_tensors(own)]
    parts.base_hash, parts.random_ctc = model.hash_text(hashes), False
    parts.frontend, parts.ctc_tokenizer = encoder, ctc and TokenCoder(tokenizer, ctc)
    llm, parts.tokenizer = (llm, tokenizer) if with_llm else (None, None)
    parts.nano = AdaptedLLM(encoder, adaptor, llm, ctc, config["settings"])


def load_tensors(nano, weights, where):
    """All tensors of the parts that nano has, strictly."""
    parts = {name for name, _ in nano.named_children()}
    model.load_weights(nano, {k: v for k, v in weights.items() if k.split(".")[0] in parts}, where)


def hf_names(name, conf):
    """transformers' names for a tensor of the release: three for linear_q_k_v, else one.

    It counts the encoder's blocks through, and gives two of them the norms that follow them.
    """
    part, stack, *rest = name.split(".")
    if part == "audio_encoder":
        blocks, tp_blocks = conf["num_blocks"], conf["tp_blocks"]
        norms = {"after_norm": blocks - 1, "tp_norm": blocks + tp_blocks - 1}
        first = {"encoders0": 0, "encoders": 1, "tp_encoders": blocks}
        if stack in norms:
            rest = [str(norms[stack]), "final_layernorm", *rest]
        else:
            rest[0] = str(first[stack] + int(rest[0]))
        name = ".".join(["model.audio_tower.layers", *rest])
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return [name.replace("linear_q_k_v", f"{x}_proj") for x in ("qkv" if "q_k_v" in name else "q")]


def base_file(start):
    """The file of a model's weights, in funasr's or transformers' folder; else `start` itself."""
    paths = (Path(start) / name for name in ("model.pt", "model.safetensors"))
    return next(filter(Path.is_file, paths), Path(start))


def llm_folder(base, conf):
    """Where the LLM's configuration and tokenizer lie: transformers has one folder for all."""
    one = Path(base).suffix == ".safetensors"
    return Path(base).parent / ("" if one else conf["llm_conf"]["init_param_path"])


def read_base(path, conf):
    """Tensors of a model.pt, or of transformers' model.safetensors by the release's names."""
    if Path(path).suffix != ".safetensors":
        return model.read_weights(path, mmap=True)
    from safetensors.torch import load_file

    with torch.device("meta"):  # for the names
        encoder = model.SenseVoiceEncoder(**conf["audio_encoder_conf"])
        speech = FunASRNano(encoder, FunASRTransformer(**conf["audio_adaptor_conf"])).state_dict()
    with model.loading(Path(path).parent):
        theirs, ctc = load_file(path), Path(path).with_name("ctc.safetensors")
        found = load_file(ctc) if ctc.is_file() else {}
    stem = "model.language_model."
    theirs.setdefault("lm_head.weight", theirs.get(f"{stem}embed_tokens.weight"))  # tied
    llm = [f"llm.model.{name.removeprefix(stem)}" for name in theirs if name.startswith(stem)]
    for name in (*speech, *llm, "llm.lm_head.weight"):
        pieces = [theirs.pop(n, None) for n in hf_names(name, conf["audio_encoder_conf"])]
        if pieces[0] is None or pieces[-1] is None:
            raise model.UserError(f"{path}: has no {name}; {NOT_NANO}")
        found[name] = torch.cat(pieces) if pieces[1:] else pieces[0]
    if theirs:
        raise model.UserError(f"{path}: {min(theirs)} is not known; {NOT_NANO}")
    return found


def load_nano(parts, conf, llm_dtype, with_llm, with_ctc):
    """Fun-ASR-Nano of a model.pt. with_ctc: a file without CTC branch gets a random one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    weights, folder = read_base(parts.base, conf), Path(parts.base).parent
    nano = parts.nano = FunASRNano(model.SenseVoiceEncoder(**conf["audio_encoder_conf"]))
    parts.frontend = NanoFrontend(**conf["frontend_conf"])
    parts.base_hash = model.hash_tensors(weights)
    if with_llm:
        path = llm_folder(parts.base, conf)
        if not (path / "config.json").is_file():
            raise model.UserError(f"{path}: no config.json of the LLM (llm_conf.init_param_path)")
        parts.tokenizer, config = model.load_tokenizer(path), AutoConfig.from_pretrained(path)
        nano.llm = AutoModelForCausalLM.from_config(config.get_text_config(), dtype=llm_dtype)
        nano.audio_adaptor = FunASRTransformer(**conf["audio_adaptor_conf"])
        nano.low_rate = conf["audio_adaptor_conf"]["use_low_frame_rate"]
    parts.random_ctc = with_ctc and "ctc.ctc_lo.weight" not in weights
    if with_ctc or "ctc.ctc_lo.weight" in weights:
        vocabulary = conf.get("dataset_conf", {}).get("ctc_tokenizer_conf", {}).get("vocab_path")
        coder = SenseVoiceTokenizer(vocabulary or folder / "multilingual.tiktoken")
        nano.ctc_decoder, parts.ctc_tokenizer = FunASRTransformer(**conf["ctc_decoder_conf"]), coder
        nano.ctc = CTCOutput(nano.ctc_decoder.width, coder.classes, **conf["ctc_conf"])
    if parts.random_ctc:
        weights = weights | {k: v for k, v in nano.state_dict().items() if k.startswith(CTC)}
    load_tensors(nano, weights, parts.base)


def load_parts(conf, start, llm_dtype, with_llm, with_ctc=False, texts=(), moved=""):
    """Load a model, and what a run has changed in it.

    Input   conf: FunASR's sections, of config.yaml, of a run's config.json or of ours; start:
            model.pt, model.safetensors, a Whisper's name, a run folder of train_phase2.py, or one
            of this script, whose base now lies at `moved`; llm_dtype: of the LLM, all else is
            fp32; texts: whose symbols are Whisper's CTC classes.
    Output  namespace: nano, frontend, tokenizer (of the LLM, or None), ctc_tokenizer (or None),
            random_ctc, base, base_hash, first (tensors of the run that it goes on from).
    """
    run = read_run(start)
    first = model.read_weights(Path(start) / "trained.pt") if run else {}
    base = str(moved or run.get("base") or start)
    base = str(Path(base).resolve()) if Path(base).exists() else base
    parts = SimpleNamespace(base=base, tokenizer=None, ctc_tokenizer=None, first=first)
    if phase2 := read_phase2(base):
        load_adapted(parts, conf, llm_dtype, with_llm, phase2)
    elif conf["audio_encoder"] == SANM:
        with_ctc = with_ctc or "ctc.ctc_lo.weight" in first
        with model.loading(Path(base).parent):
            load_nano(parts, conf, llm_dtype, with_llm, with_ctc)
    else:
        encoder, kind = model.load_encoder(base), conf["dataset_conf"]["ctc_tokenizer"]
        if not isinstance(encoder, model.WhisperEncoder):
            raise model.UserError(f"audio_encoder={base}: expected {SANM} or a Whisper")
        coder = parts.ctc_tokenizer = SymbolTokenizer(kind, texts, run.get("ctc_symbols"))
        ctc = CTCOutput(encoder.width, coder.classes, **conf["ctc_conf"])
        parts.nano, parts.frontend, parts.random_ctc = FunASRNano(encoder, ctc=ctc), encoder, True
        parts.base_hash = encoder.identity["weights"]
    if run and run["base_hash"] != parts.base_hash:
        said = f"its hash is {parts.base_hash}, in training it was {run['base_hash']}"
        raise model.UserError(f"{base}: is not what {start} was trained on, {said}")
    has_lora = parts.tokenizer and any("lora_" in n for n, _ in parts.nano.llm.named_parameters())
    if parts.tokenizer and conf["llm_conf"].get("use_lora") and not has_lora:
        import peft

        lora = conf["llm_conf"]["lora_conf"]
        lora = {key: lora[key] for key in ("r", "lora_alpha", "lora_dropout", "target_modules")}
        lora = peft.LoraConfig(task_type="CAUSAL_LM", **lora)
        peft.get_peft_model(model.freeze(parts.nano.llm), lora)
    if run:
        load_tensors(parts.nano, parts.nano.state_dict() | first, f"{start}/trained.pt")
        parts.random_ctc = False
    return parts


def load_for_training(cfg, device, say=print):
    """Parts as the configuration asks for them, frozen for good where it says so."""
    lists = [*cfg.train_data_set_list, *cfg.telephone_conf.data_set_list, *cfg.clean_data_set_list]
    texts = (ctc_text(row["target"], cfg) for _, _, row in list_rows(lists, cfg))
    half = device.type == "cuda" and cfg.llm_conf.freeze and cfg.llm_conf.llm_dtype == "bf16"
    if half and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise model.UserError("this GPU has no bf16: set llm_conf.llm_dtype=fp32")
    start = cfg.init_param or (cfg.audio_encoder != SANM and cfg.audio_encoder)
    start = Path(start or model.find_model(cfg.model))
    start = base_file(start) if cfg.audio_encoder == SANM else start
    llm = torch.bfloat16 if half else torch.float32, cfg.llm != "none"
    parts = load_parts(OmegaConf.to_container(cfg), start, *llm, cfg.ctc_weight > 0, texts)
    if parts.random_ctc and cfg.ctc_decoder_conf.freeze:
        said = "a frozen random one is noise: set ctc_decoder_conf.freeze=false"
        raise model.UserError(f"{parts.base}: has no CTC branch (ModelScope's has), and {said}")
    if cfg.audio_encoder == SANM and (parts.random_ctc or parts.nano.ctc is None):
        said = "a new one trains" if parts.random_ctc else "none trains"
        say(f"{parts.base}: has no CTC branch (ModelScope's model.pt has), {said}")
    frozen = {name: cfg[f"{name}_conf"].freeze for name in ("audio_encoder", "audio_adaptor")}
    frozen |= dict.fromkeys(CTC, cfg.ctc_decoder_conf.freeze)
    lora = cfg.llm_conf.use_lora or isinstance(parts.nano, AdaptedLLM)  # they have done it
    frozen["llm"] = cfg.llm_conf.freeze and not lora
    out = [part for name, part in parts.nano.named_children() if frozen[name]]
    blocks, lowest = parts.nano.blocks(), max(0, cfg.audio_encoder_conf.freeze_layer_num)
    if lowest >= len(blocks):
        wanted = f"audio_encoder_conf.freeze_layer_num={lowest}"
        raise model.UserError(f"{wanted}: the encoder has {len(blocks)} blocks")
    if lowest and isinstance(parts.frontend, model.WhisperEncoder):
        out += [parts.frontend.net.conv1, parts.frontend.net.conv2]
    for part in out + blocks[:lowest]:
        model.freeze(part)
    shown = cfg.dataset_conf.prompt_conf.max_neg_hotwords_num
    parts.pools = hotword_pools(cfg) if parts.tokenizer else {True: [], False: []}
    parts.extra = 0
    if parts.tokenizer and shown:  # positions that the longest distractors may take
        words = [f", {word}" for pool in parts.pools.values() for word in pool]
        lengths = sorted(map(len, parts.tokenizer(words)["input_ids"])) if words else []
        parts.extra = sum(lengths[-shown:])
    return parts


# ---- data -------------------------------------------------------------------


def hotword_pools(cfg):
    """{True: Chinese, False: other} words that may be distractors: of the lists, else of the
    training clips' own hotwords and texts."""
    conf, pools = cfg.dataset_conf.prompt_conf, {True: set(), False: set()}
    lists = {True: conf.chinese_hotwords_list, False: conf.english_hotwords_list}
    for cjk in (cjk for cjk, path in lists.items() if path):
        pools[cjk] = {line for _, line in model.read_lines(lists[cjk])}
    specs = [*cfg.train_data_set_list, *cfg.telephone_conf.data_set_list, *cfg.valid_data_set_list]
    for _, _, row in list_rows(specs, cfg):
        text = model.normalize_text(row["target"] or "")
        if not lists[cjk := model.is_cjk(text)]:
            pools[cjk].update(model.as_list(row.get("hotwords") or ""))
            pools[cjk].update(re.findall("..." if cjk else r"\S{5,}", text))
    return {cjk: sorted(words) for cjk, words in pools.items()}


def draw_hotwords(clip, pools, count, rng):
    """The clip's hotwords among `count` that are not said, in any order."""
    said, right = model.normalize_text(clip.target), model.as_list(clip.prompt[0])
    pool = pools[model.is_cjk(said)] or pools[True] or pools[False]
    wrong = rng.sample(pool, min(len(pool), count + len(right) + 5))
    wrong = [word for word in wrong if model.normalize_text(word) not in said and word not in right]
    words = right + wrong[:count]
    return ", ".join(rng.sample(words, len(words)))


@dataclass
class Clip:
    key: str
    source: str  # path, or its place in a table
    place: tuple | None  # (manifest, number of its row); None: silence that is made up
    target: str
    kind: str  # of SETS, silence, or hotwords among so many DISTRACTORS
    prompt: tuple  # hotwords, language, instruction, itn: of nano_prompt
    seconds: float = 0.0  # 0 where it cannot be read
    frames: int = 0  # of 10 ms
    ids: list = ()  # labels of the LLM, its end of turn included
    classes: list = ()  # labels of CTC
    length: float = 0.0  # in the unit of dataset_conf.batch_size
    reason: str = ""  # why it is left out
    silent: bool = False  # nobody speaks: the end of turn at once, and only blanks


def list_rows(specs, cfg):
    """(rows, number, row) of manifests, or of FunASR's .list of manifests."""
    for spec in model.as_list(specs):
        listed = Path(spec).suffix in (".list", ".txt") and Path(spec).is_file()
        for name in [line for _, line in model.read_lines(spec)] if listed else [spec]:
            folder = Path(cfg.output_dir).parent / "manifests"
            rows = model.read_manifest(name, folder, strip_tags=cfg.dataset_conf.strip_tags)
            rows = model.with_seconds(rows, folder)
            yield from ((rows, number, row) for number, row in enumerate(rows))


def ctc_text(text, cfg):
    normalize = cfg.dataset_conf.ctc_target_normalize
    return model.normalize_text(text or "") if normalize else (text or "").strip()


def read_clips(specs, kind, cfg, parts, training):
    """Clips with labels, lengths by the files' headers, and the reason why one is left out."""
    conf, tokenizer, nano, clips = cfg.dataset_conf, parts.tokenizer, parts.nano, []
    stop = tokenizer and [nano.stop_id(tokenizer)]
    for rows, number, row in list_rows(specs, cfg):
        source, target = row.get("source") or row["where"], (row["target"] or "").strip()
        fields = ("hotwords", "asr_hotwords")
        fields = [name for name in fields if conf.prompt_conf[f"use_{name}"]]
        prompt = row_prompt(row, fields, conf.prompt_conf.itn)
        clip = Clip(row["key"], source, (rows, number), target, kind, prompt, row["seconds"])
        clip.reason = row["reason"]
        clips.append(clip)
        # null, and all that only distillation hears, is speech without a transcript; "" is silence
        untold = row["target"] is None or cfg.distill_weight and kind == "simulated"
        clip.silent = not (target or untold) and conf.empty_targets == "keep"
        if tokenizer and (target or clip.silent):
            clip.ids = (nano.label_ids(tokenizer, target) if target else []) + stop
        if parts.ctc_tokenizer:
            clip.classes = parts.ctc_tokenizer.encode(ctc_text(target, cfg))
        labels = len(clip.ids) or len(clip.classes)
        clip.frames = model.fbank_frames(round(clip.seconds * 16000))
        slowest = clip.frames / min(conf.speed_perturb)
        clip.length = slowest + labels * (conf.batch_type == "token")
        if tokenizer and conf.batch_type != "example":  # LLM positions, in the same currency
            prompt = sum(map(len, nano.prompt(tokenizer, *clip.prompt))) + training * parts.extra
            positions = nano.most_positions(math.ceil(slowest)) + prompt + labels
            clip.length = max(clip.length, positions * conf.batch_size / conf.batch_size_token_max)
        limits = {
            "shorter than 25 ms": clip.frames < 1,
            "longer than max_token_length": clip.frames + labels > conf.max_token_length,
            "longer than max_source_length": clip.frames > conf.max_source_length,
            "shorter than min_source_length": clip.frames < conf.min_source_length,
            "text longer than max_target_length": labels > conf.max_target_length,
            "larger than batch_size": clip.length > batch_limits(cfg)[0],
            "no transcript": not (labels or clip.silent)
            and not (cfg.distill_weight and kind == "simulated"),
        }
        for reason, holds in limits.items() if training else [*limits.items()][:1]:
            clip.reason = clip.reason or holds * reason
    return clips


def silence_clips(count, cfg, parts, hotwords=0):
    """Made-up clips of 0.2 to 20 s; `hotwords` in the prompt of every other one."""
    rng, clips, tokenizer = random.Random(f"{cfg.seed} silence {count}"), [], parts.tokenizer
    stop, nano = tokenizer and [parts.nano.stop_id(tokenizer)], parts.nano
    rest = ("", "", cfg.dataset_conf.prompt_conf.itn)
    longest = min(20.0, batch_limits(cfg)[0] / 200, cfg.dataset_conf.max_token_length / 110)
    for n in range(count):
        seconds = math.exp(rng.uniform(math.log(0.2), math.log(longest)))
        clip = Clip(f"silence-{n}", "", None, "", "silence", ("", *rest), seconds, silent=True)
        clip.frames, clip.ids = model.fbank_frames(round(seconds * 16000)), stop or ()
        if hotwords and n % 2:
            clip.prompt = draw_hotwords(clip, parts.pools, hotwords, rng), *rest
        clip.length = clip.frames + len(clip.ids)
        if tokenizer:
            prompt = sum(map(len, nano.prompt(tokenizer, *clip.prompt))) + parts.extra
            positions = nano.most_positions(clip.frames) + prompt + 1
            scale = cfg.dataset_conf.batch_size / cfg.dataset_conf.batch_size_token_max
            clip.length = max(clip.length, positions * scale)
        clips.append(clip)
    return clips


def read_data(cfg, parts, say):
    """Usable clips: train (the rehearsal last), n_clean, valid; {key: clip} of those left out."""
    data, valid = SimpleNamespace(dropped={}), cfg.clean_valid_data_set_list
    clean = cfg.clean_data_set_list if cfg.data_mix else []
    train = cfg.train_data_set_list, cfg.telephone_conf.data_set_list, clean
    for name, lists in (("train", train), ("valid", (cfg.valid_data_set_list, valid, valid))):
        pairs = zip(lists, SETS, strict=True)
        clips = [c for pair in pairs for c in read_clips(*pair, cfg, parts, name == "train")]
        for reason in sorted({clip.reason for clip in clips}):
            group = [clip for clip in clips if clip.reason == reason]
            longest = max(group, key=lambda clip: clip.seconds)
            said = f"{len(group)} clips{', left out, ' * bool(reason)}{reason}"
            say(f"{name}: {said}, {sum(clip.seconds for clip in group) / 3600:.3f} h, "
                f"the longest is {longest.key} ({longest.seconds:.1f} s)")  # fmt: skip
        data.dropped |= {(clip.kind, clip.key): clip for clip in clips if clip.reason}
        kept = [clip for clip in clips if not clip.reason]
        hotwords, language, prompt = (sum(bool(c.prompt[n]) for c in kept) for n in range(3))
        say(f"{name}: {hotwords} clips with hotwords, {language} with a language, {prompt} with a "
            "prompt of their own")  # fmt: skip
        setattr(data, name, kept)
    check_readable(data.dropped, cfg)
    add_silence_and_hotwords(data, cfg, parts)
    kinds = Counter(clip.kind for clip in data.train)
    data.n_clean = kinds["clean"]
    if len(data.train) == data.n_clean or not data.valid:
        raise model.UserError("no clips: give train_data_set_list and valid_data_set_list")
    if cfg.data_mix and not data.n_clean:
        raise model.UserError("data_mix: needs clips in clean_data_set_list")
    if cfg.distill_weight and not kinds["simulated"] + kinds["clean"]:
        raise model.UserError("distill_weight: needs clean speech in telephone_conf.data_set_list")
    return data


def add_silence_and_hotwords(data, cfg, parts):
    """Silence to train on (first) and to score; clips with hotwords once per DISTRACTORS."""
    share, rng = cfg.telephone_conf.silence_share, random.Random(f"{cfg.seed} hotwords")
    spoken = sum(clip.kind != "clean" for clip in data.train)
    data.train[:0] = silence_clips(round(share / (1 - share) * spoken), cfg, parts)
    data.valid += silence_clips(cfg.telephone_conf.silence_clips, cfg, parts, 10)
    asked = [clip for clip in data.valid if clip.prompt[0] and clip.kind == "telephone"]
    for count in DISTRACTORS if parts.tokenizer else ():
        for clip in asked:
            words = draw_hotwords(clip, parts.pools, count, rng)
            prompt = (words, *clip.prompt[1:])
            data.valid.append(replace(clip, kind=f"hotwords{count}", prompt=prompt))


def check_readable(dropped, cfg):
    """UserError if more clips than dataset_conf.retry could not be read."""
    broken, limit = [clip for clip in dropped.values() if not clip.seconds], cfg.dataset_conf.retry
    if len(broken) > limit:
        many = f"{len(broken)} clips cannot be read, more than dataset_conf.retry={limit}"
        last = f"the last is {broken[-1].key}: {broken[-1].source} {broken[-1].reason}"
        raise model.UserError(f"{many}; {last}")


def batch_limits(cfg):
    """Most length, and most clips of a batch."""
    conf = cfg.dataset_conf
    by_length = conf.batch_size, conf.batch_size_sample_max
    return (math.inf, conf.batch_size) if conf.batch_type == "example" else by_length


def epoch_groups(data, cfg, world, epoch):
    """Groups of batches of an epoch, a function of seed and epoch: model.length_batches over all
    telephone clips and as many of the clean ones as make data_mix of the whole."""
    count = len(data.train) - data.n_clean
    wanted = count + round(cfg.data_mix / (1 - cfg.data_mix) * count)
    rng, chosen = np.random.default_rng([cfg.seed, epoch, 1]), [*range(count)]
    while len(chosen) < wanted:  # too few: some come again
        chosen += (count + rng.permutation(data.n_clean)).tolist()
    lengths = [data.train[n].length for n in chosen[:wanted]]
    budget, most = batch_limits(cfg)
    groups = model.length_batches(lengths, budget, world, cfg.seed, epoch, most)
    return [[[chosen[n] for n in batch] for batch in group] for group in groups]


@dataclass
class Batch:
    feats: torch.Tensor  # (B + K, T, F) features, zeros where padded, K clean twins behind
    lens: torch.Tensor  # (B + K,) on the CPU
    clips: list  # B of Clip; those that could not be read have a reason, and no labels
    twin_of: list  # K places of the clips that the twins belong to
    twin_frames: int  # of the encoder's output for the twins
    epoch: int
    used: int  # groups of the epoch that are then behind us

    def pin_memory(self):
        self.feats = self.feats.pin_memory()
        return self

    def labels(self, cfg):
        """What the losses of this batch are divided by."""
        count = len if cfg.model_conf.length_normalized_loss else bool
        ce = sum(count(clip.ids) for clip in self.clips)
        ctc = sum(count(clip.classes) or clip.silent for clip in self.clips)
        return {"ce": ce, "ctc": ctc, "distill": self.twin_frames}


class Clips(torch.utils.data.Dataset):
    """(epoch, number, group of model.length_batches) -> Batch of this process.

    Speed, line, dither and masks are functions of seed, epoch and clip. Epoch -1, of validation:
    nothing is random but the simulated line, which is the same every time.
    """

    def __init__(self, clips, frontend, cfg, rank, pools=None):
        self.clips, self.frontend, self.cfg, self.rank = clips, frontend, cfg, rank
        self.calls = [clip.place for clip in clips if clip.kind == "telephone"]
        self.pools, self.quiet = pools, cfg.telephone_conf.copy()
        self.quiet.level_prob = self.quiet.noise_prob = 0.0  # of silence: it would be made loud
        stacked = isinstance(frontend, NanoFrontend)  # else Whisper's, which has 16 kHz anyway
        self.wide = NanoFrontend(**{**cfg.frontend_conf, "fs": 16000}) if stacked else frontend
        masks = {k: v for k, v in cfg.specaug_conf.items() if "time_warp" not in k}
        masks["lfr_rate"] *= stacked
        self.masking = model.SpecAugLFR(**masks) if cfg.specaug else None

    def __getitem__(self, place):
        epoch, number, group = place
        items = [self.load(self.clips[n], epoch) for n in group[self.rank]]
        clips, feats, twins = map(list, zip(*items, strict=True))
        twin_of = [n for n, twin in enumerate(twins) if twin is not None]
        feats += [twins[n] for n in twin_of]
        lens = torch.tensor([len(x) for x in feats])
        frames = int(self.frontend.out_lens(lens[len(clips) :]).sum())
        feats = pad_sequence(feats, batch_first=True)
        return Batch(feats, lens, clips, twin_of, frames, epoch, number + 1)

    def load(self, clip, epoch):
        """Clip, its features, and with distillation those of the same speech, clean, or None."""
        name, conf = f"{self.cfg.seed}-{epoch}-{clip.key}", self.cfg.dataset_conf.prompt_conf
        if epoch >= 0 and conf.max_neg_hotwords_num:
            rng = random.Random(f"{name} hotwords")
            count = rng.randint(conf.min_neg_hotwords_num, conf.max_neg_hotwords_num)
            shown = clip
            if count and rng.random() < ONLY_DISTRACTORS:
                shown = replace(clip, prompt=("", *clip.prompt[1:]))
            words = draw_hotwords(shown, self.pools, count, rng)
            clip = replace(clip, prompt=(words, *clip.prompt[1:]))
        try:
            heard, twin = self.features(clip, epoch, name)
        except model.AudioError as error:  # a second of silence takes its place
            heard, twin = self.wide.features(torch.zeros(16000), name), None
            empty = {"ids": (), "classes": (), "silent": False, "seconds": 0.0}
            clip = replace(clip, **empty, reason=str(error))
        if self.masking is not None and epoch >= 0:
            seed = int(model.hash_text(f"{name} masks")[:15], 16)
            heard = self.masking(heard, torch.Generator().manual_seed(seed))
        return clip, heard, twin if self.cfg.distill_weight else None

    def features(self, clip, epoch, name):
        cfg, rng, rate = self.cfg, random.Random(name), self.frontend.sample_rate
        on_phone = clip.kind in ("telephone", *AGAIN)  # else clean speech
        own_rate = rate if on_phone else 16000
        speed = rng.choice(list(cfg.dataset_conf.speed_perturb)) if epoch >= 0 else 1.0
        if clip.place is None:
            return self.frontend.features(self.silence(clip, epoch, rng), name), None
        row = clip.place[0][clip.place[1]]
        wave = model.change_speed(model.load_clip(row, own_rate), speed, own_rate)
        if on_phone and (epoch < 0 or rng.random() >= cfg.telephone_conf.prob):
            return self.frontend.features(wave, name), None
        wave = wave[: len(wave) // 2 * 2]  # an even number: both rates then have the same frames
        clean = None if on_phone else self.wide.features(wave, name)
        if clip.kind == "clean":
            return clean, clean
        line = simulate_telephone(model.resample(wave, own_rate, 8000), cfg.telephone_conf, rng)
        line = model.resample(line, 8000, rate)[: len(wave) * rate // own_rate]
        return self.frontend.features(line, name), clean

    def silence(self, clip, epoch, rng):
        """Made up and sent through the line, or a pause of one of the calls, which was there."""
        rate = self.frontend.sample_rate
        if epoch >= 0 and self.calls and rng.random() < 0.3:
            rows, number = rng.choice(self.calls)
            pause = longest_pause(model.load_clip(rows[number], 8000), 8000)
            if pause is not None:
                return model.resample(pause[: round(8000 * clip.seconds)], 8000, rate)
        line = simulate_telephone(make_silence(clip.seconds, rng), self.quiet, rng)
        return model.resample(line, 8000, rate)


def load_batches(clips, places, parts, cfg, rank, device):
    dataset, gpu = Clips(clips, parts.frontend, cfg, rank, parts.pools), device.type == "cuda"
    rest = {"num_workers": cfg.dataset_conf.num_workers, "pin_memory": gpu}
    return torch.utils.data.DataLoader(dataset, batch_size=None, sampler=places, **rest)


# ---- losses -----------------------------------------------------------------


class Finetune(nn.Module):
    """The model and its losses in one module, so that DDP wraps one forward pass."""

    def __init__(self, parts, cfg):
        super().__init__()
        self.nano, self.tokenizer, self.cfg, self.original = parts.nano, parts.tokenizer, cfg, None
        if cfg.distill_weight:
            self.original = model.freeze(copy.deepcopy(parts.nano.audio_encoder))
        losses = {"ce": (cfg.llm_weight, self.nano.llm), "ctc": (cfg.ctc_weight, self.nano.ctc)}
        losses["distill"] = (cfg.distill_weight, self.original)
        self.weights = {name: w for name, (w, part) in losses.items() if w and part is not None}

    def forward(self, feats, batch):
        """Sums over the batch: CE (nats), right tokens, CTC (nats), clips that CTC leaves out,
        squared distances (frames); in eval mode `heard` too, for the read-outs."""
        nano, clips, count = self.nano, batch.clips, len(batch.clips)
        enc, lens = nano.encode(feats[:count], batch.lens[:count])
        zero = enc.sum() * 0.0
        sums = {"ce": zero, "right": 0, "ctc": zero, "impossible": 0, "distill": zero}
        if "ce" in self.weights:
            noise = self.cfg.feature_noise if self.training else 0.0
            noisy = enc + noise * torch.randn_like(enc) if noise else enc
            embed, speech = nano.llm.get_input_embeddings(), nano.listen(noisy, lens)
            prompts = [nano.prompt(self.tokenizer, *clip.prompt) for clip in clips]
            spliced = model.splice(embed, prompts, *speech, [clip.ids for clip in clips])
            smoothing = self.cfg.model_conf.lsm_weight if self.training else 0.0
            sums["ce"], _, sums["right"] = model.transcript_loss(nano.llm, spliced, smoothing)
        if "ctc" in self.weights:
            scores = nano.ctc_log_probs(enc.detach() if self.cfg.detach_ctc_decoder else enc, lens)
            classes, blank = [clip.classes for clip in clips], nano.ctc.blank
            sums["ctc"], sums["impossible"] = model.ctc_loss(*scores, classes, blank)
            silent = [n for n, clip in enumerate(clips) if clip.silent]
            if silent:  # -log p of blanks alone, as CTC of an empty text is
                real = model.length_mask(scores[1][silent], scores[0].shape[1], enc.device)
                sums["ctc"] = sums["ctc"] - scores[0][silent, :, blank][real].sum()
                sums["impossible"] -= len(silent)
        if batch.twin_of:
            with torch.no_grad():
                wanted, twin_lens = self.original(feats[count:], batch.lens[count:])
            keep = model.length_mask(twin_lens, enc.shape[1], enc.device)
            distance = (enc[batch.twin_of] - wanted.float()).pow(2).mean(-1)  # (K, T)
            sums["distill"] = distance.masked_fill(~keep, 0.0).sum()
        return sums if self.training else sums | {"heard": nano.hear(enc, lens)}


def check_losses(tuner, say):
    """UserError if a part trains that no loss reaches; says what trains, and by which loss."""
    trains, reached = set(), set()
    for name, part in tuner.nano.named_children():
        count = sum(p.numel() for p in part.parameters() if p.requires_grad)
        say(f"{name}: {count:,} of {sum(p.numel() for p in part.parameters()):,} weights train")
        trains |= {name} if count else set()
    reach = {"ce": {"audio_encoder", "audio_adaptor", "llm"}, "distill": {"audio_encoder"}}
    reach["ctc"] = {*CTC, *tuner.nano.ctc_through}
    reach["ctc"] |= set() if tuner.cfg.detach_ctc_decoder else {"audio_encoder"}
    for name, weight in tuner.weights.items():
        reached |= reach[name] & trains
        say(f"{name} (weight {weight:g}) trains {sorted(reach[name] & trains)}")
    if not reached:
        raise model.UserError("nothing trains: unfreeze a part, or give a loss that reaches it")
    if rest := trains - reached:
        said = "freeze it, give its loss a weight, or set detach_ctc_decoder=false"
        raise model.UserError(f"no loss reaches {min(rest)}, which is trainable; {said}")


def make_optimizer(nano, conf):
    """AdamW; `scale` of a group is its share of the rate: lower blocks and CTC have their own."""
    groups, blocks = {}, nano.blocks()
    depth = {p: len(blocks) - 1 - n for n, block in enumerate(blocks) for p in block.parameters()}
    for name, p in nano.named_parameters():
        scale = 1.0
        if name.startswith(CTC):
            scale = (conf.ctc_lr or conf.lr) / conf.lr
        elif name.startswith("audio_encoder."):  # outside the blocks: norms above, the rest below
            scale = conf.layer_decay ** depth.get(p, 0 if "norm" in name else len(blocks))
        if p.requires_grad:
            groups.setdefault((scale, conf.weight_decay * (p.ndim > 1)), []).append(p)
    groups = [{"params": p, "scale": s, "weight_decay": d} for (s, d), p in groups.items()]
    return torch.optim.AdamW(groups, lr=conf.lr, betas=tuple(conf.betas), fused=True)


def learning_rate(step, cfg):
    """FunASR's warmuplr: linear to the peak, then by 1 / sqrt(step), never 0."""
    n, warmup = step + 1, cfg.scheduler_conf.warmup_steps
    return cfg.optim_conf.lr * (min(n / warmup, math.sqrt(warmup / n)) if warmup else 1.0)


def train_step(wrapped, tuner, optimizer, batches, run, window):
    """One optimizer step; adds to `window`. Output: the gradient's norm before clipping."""
    cfg = tuner.cfg
    counts = torch.tensor([[*batch.labels(cfg).values()] for batch in batches]).sum(0).float()
    counts = counts.to(run.device, non_blocking=True)
    if run.world > 1:
        dist.all_reduce(counts)  # labels of the step, of all processes
    totals = dict(zip(("ce", "ctc", "distill"), counts.clamp(min=1), strict=True))
    for batch in batches:
        waits = run.world > 1 and batch is not batches[-1]  # gradients are summed in the last one
        with wrapped.no_sync() if waits else contextlib.nullcontext():
            with run.amp:
                sums = wrapped(batch.feats.to(run.device, non_blocking=True), batch)
            loss = sum(weight * sums[n] / totals[n] for n, weight in tuner.weights.items())
            (loss * run.world).backward()  # DDP averages over processes; we want the sum
        window.update({n: torch.as_tensor(value).detach() for n, value in sums.items()})
        window.update({f"n_{name}": count for name, count in batch.labels(cfg).items()})
        window.update(tokens=sum(len(clip.ids) for clip in batch.clips))
        window.update(audio_s=sum(clip.seconds for clip in batch.clips))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, cfg.train_conf.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    window.update(steps=1, grad_norm=norm)
    return norm


# ---- validation -------------------------------------------------------------


@torch.no_grad()
def evaluate(tuner, data, parts, run, most=sys.maxsize):
    """Error rates and losses over `most` clips of each validation set; the processes share them.

    Output  scores {telephone_llm_er: ...}, and [(clip, LLM's text, CTC's text)]
    """
    tuner.eval()
    cfg, places, found, sums, scores = tuner.cfg, [], [], Counter(), {}
    kinds = dict.fromkeys(clip.kind for clip in data.valid)
    for kind in kinds:
        chosen = [n for n, clip in enumerate(data.valid) if clip.kind == kind]
        spread = np.linspace(0, len(chosen) - 1, min(most, len(chosen))).astype(int)
        chosen = [chosen[n] for n in spread]
        lengths = [data.valid[n].length for n in chosen]
        limit = max([batch_limits(cfg)[0], *lengths])
        groups = model.length_batches(lengths, limit, 1, 0, 1, 16) if chosen else []
        places += [(-1, 0, [[chosen[n] for n in batch]]) for (batch,) in groups]
    places = places[run.rank :: run.world]
    for batch in load_batches(data.valid, places, parts, cfg, 0, run.device):
        kind, feats = batch.clips[0].kind, batch.feats.to(run.device)
        with run.amp:
            if kind in AGAIN:  # clips of `telephone` once more, whose losses cost half the time
                heard = tuner.nano.hear(*tuner.nano.encode(feats, batch.lens))
            else:
                losses = tuner(feats, batch)
                heard = losses["heard"]
                sums.update({(kind, name): float(losses[name]) for name in tuner.weights})
                counts = batch.labels(cfg).items()
                sums.update({(kind, f"n_{name}"): count for name, count in counts})
            said = transcribe(tuner, heard, batch.clips)
        read = [parts.ctc_tokenizer.decode(path) for path in heard.paths or []]
        found += zip(batch.clips, said, read or [None] * len(said), strict=True)
    shared = [(found, sums)] * run.world
    if run.world > 1:
        dist.all_gather_object(shared, (found, sums))
    rows, sums = [row for part, _ in shared for row in part], Counter()
    for _, part in shared:
        sums.update(part)  # a sum of Counters would leave a NaN out
    data.dropped |= {(clip.kind, clip.key): clip for clip, _, _ in rows if clip.reason}
    rows = [row for row in rows if not row[0].reason]
    for kind in kinds:
        for name, column in (("llm_er", 1), ("ctc_er", 2)):
            pairs = [(r[0].target, r[column]) for r in rows if r[0].kind == kind and r[0].target]
            if pairs and pairs[0][1] is not None:
                scores[f"{kind}_{name}"] = model.error_rate(*zip(*pairs, strict=True))["rate"]
        counted = [name for name in tuner.weights if sums[kind, f"n_{name}"]]
        scores |= {f"{kind}_{n}": sums[kind, n] / sums[kind, f"n_{n}"] for n in counted}
    tuner.train()
    return scores, rows


def details(rows):
    """What an error rate hides, of (clip, LLM's text, CTC's text): {label: counts, or a number}."""
    found, turns = {}, {"": (0, math.inf), ", turns under 1 s": (0, 1)}
    turns |= {", 1 to 3 s": (1, 3), ", over 3 s": (3, math.inf)}
    for read_out, column in (("LLM", 1), ("CTC", 2)):
        known = [(row[0], row[column]) for row in rows if row[column] is not None]
        for kind, (turn, (low, high)) in itertools.product(SETS, turns.items()):
            part = [(c.target, text) for c, text in known
                    if c.kind == kind and c.target and low <= c.seconds < high]  # fmt: skip
            if part:
                counts = model.error_rate(*zip(*part, strict=True))
                found[f"{kind}{turn}, {read_out}"] = counts
        for name, shown in (("silence", False), ("silence with hotwords shown", True)):
            part = [(c, text) for c, text in known if c.silent and bool(c.prompt[0]) == shown]
            minutes = sum(clip.seconds for clip, _ in part) / 60
            texts = [model.normalize_text(text) for _, text in part]
            words = sum(len(model.score_units(text, model.is_cjk(text))) for text in texts)
            if part:
                found[f"{name}, words a minute, {read_out}"] = words / minutes
        for count in DISTRACTORS if read_out == "LLM" else ():
            part = [(c, text) for c, text in known if c.kind == f"hotwords{count}"]
            said, heard, made_up = Counter(), Counter(), Counter()
            for clip, text in part:
                words = list(map(model.normalize_text, model.as_list(clip.prompt[0])))
                target, text = model.normalize_text(clip.target), model.normalize_text(text)
                said.update(word for word in words if word in target)
                heard.update(word for word in words if word in target and word in text)
                made_up.update(word for word in words if word in text and word not in target)
            if said:
                recall = f"said hotwords found, among {count} others, share"
                found |= {recall: heard.total() / said.total()}
                found[f"hotwords written that nobody said, {count} others"] = made_up.total()
    return found


def cell(value):
    if isinstance(value, dict):
        edits = "/".join(str(value[k]) for k in ("substitutions", "deletions", "insertions"))
        return f"{100 * value['rate']:.1f} % ({edits})"
    return "–" if value is None else f"{value:.3g}"


def transcribe(tuner, heard, clips):
    """Greedy transcripts of the LLM; None where there is none."""
    llm, tokenizer = tuner.nano.llm, tuner.tokenizer
    if llm is None:
        return [None] * len(clips)
    embed, speech = llm.get_input_embeddings(), (heard.speech, heard.speech_lens)
    prompts = [tuner.nano.prompt(tokenizer, *clip.prompt) for clip in clips]
    spliced = model.splice(embed, prompts, *speech, pad_left=True)
    stop, caps = tuner.nano.stop_id(tokenizer), tuner.nano.caps(heard, clips)
    answers = model.greedy_decode(llm, spliced, stop, caps)
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def rank_of(scores, tuner):
    """What decides which checkpoint is better, least is best: error rate of telephone speech by the
    read-out that trains most, and where that is equal its loss."""
    for kind in SETS:
        for loss, name in (("ce", "llm_er"), ("ctc", "ctc_er"), ("distill", "distill")):
            if loss in tuner.weights and f"{kind}_{name}" in scores:
                return [scores[f"{kind}_{name}"], scores.get(f"{kind}_{loss}", 0.0)]
    raise model.UserError("nothing to score: validation clips have neither text nor simulation")


# ---- the run ----------------------------------------------------------------


def trained_state(parts):
    """What makes this model of its base: what trains, and what an earlier run has changed."""
    trains = parts.nano.named_parameters(remove_duplicate=False)  # tied ones under both names
    names = {name for name, p in trains if p.requires_grad} | parts.first.keys()
    return {n: w.detach().cpu() for n, w in parts.nano.state_dict().items() if n in names}


def step_file(folder, step):
    return folder / f"step-{step:06d}.pt"


def main(cfg, check_only=False):
    conf, folder = cfg.train_conf, Path(cfg.output_dir)
    device, dtype, rank, world = model.start(
        cfg.device, "bf16" if conf.use_bf16 else "fp32", without_bf16="train_conf.use_bf16=false"
    )
    torch.set_float32_matmul_precision("high" if cfg.enable_tf32 else "highest")
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    run = SimpleNamespace(device=device, amp=amp, rank=rank, world=world)
    say = print if rank == 0 else lambda *_: None
    check(cfg, say, check_only)
    torch.manual_seed(cfg.seed)
    parts = load_for_training(cfg, device, say)
    data = read_data(cfg, parts, say)
    tuner = Finetune(parts, cfg).to(device)
    check_losses(tuner, say)
    optimizer, trained = make_optimizer(tuner.nano, cfg.optim_conf), trained_state(parts)
    groups_of = functools.lru_cache(4)(functools.partial(epoch_groups, data, cfg, world))
    total = conf.max_steps or max(1, conf.max_epoch * len(groups_of(0)) // conf.accum_grad)
    size = sum(value.nbytes for value in trained.values()) / 2**20
    say(f"{total} steps of {conf.accum_grad} x {world} batches; at most {conf.keep_nbest_models} "
        f"checkpoints of {size:.0f} MiB | {device} {dtype}, torch {torch.__version__}")  # fmt: skip
    if check_only:
        return
    symbols = parts.ctc_tokenizer and parts.ctc_tokenizer.symbols
    identity = {
        "base": {"name": parts.base, "weights": parts.base_hash},
        "valid": {"clips": model.hash_text([[clip.kind, clip.key] for clip in data.valid])},
        "trained": {"tensors": model.hash_text([sorted(trained), symbols])},
    }
    state = model.open_run(folder, cfg, identity, conf.resume, rank, world)
    names = ("step", "epoch", "used", "kept", "idle", "best", "before", "told", "spent")
    step, epoch, used, kept, idle, best, spent = 0, 0, 0, [], 0, [math.inf], 0.0
    before = told = None
    if state:
        load_tensors(tuner.nano, tuner.nano.state_dict() | state["trained"], folder / "last.pt")
        groups = optimizer.state_dict()["param_groups"]  # as they are configured now
        optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        step, epoch, used, kept, idle, best, before, told, spent = (state[n] for n in names)
        kept = [item for item in kept if step_file(folder, item[1]).is_file()]
    patience = conf.early_stopping_patience or math.inf
    if (step >= total or idle >= patience) and (folder / "results.json").is_file():
        why = "all steps are done" if step >= total else f"no better for {idle} validations"
        say(f"{folder}: this run is finished at step {step}, {why}; see {folder}/table.md")
        return
    if before is None:
        before, rows = evaluate(tuner, data, parts, run)
        told = details(rows)
        if parts.random_ctc:  # it reads noise
            before = {name: value for name, value in before.items() if "_ctc" not in name}
            told = {name: value for name, value in told.items() if "CTC" not in name}
    wrapped = tuner
    if world > 1:
        wrapped = nn.parallel.DistributedDataParallel(tuner, broadcast_buffers=False)
    places = model.endless_groups(groups_of, epoch, used)
    loader = iter(load_batches(data.train, places, parts, cfg, rank, device))
    writer = SummaryWriter(folder, purge_step=step + 1) if rank == 0 else None
    bar = tqdm(total=total, initial=step, unit="step", disable=None if rank == 0 else True)
    started = since = time.time()
    window = Counter()  # sums since the last log
    tuner.train()
    while step < total and idle < patience:
        torch.manual_seed(cfg.seed * 1_000_003 + step * world + rank)  # dropout: by the step alone
        lr = learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        batches = [next(loader) for _ in range(conf.accum_grad)]
        norm = train_step(wrapped, tuner, optimizer, batches, run, window)
        step, epoch, used = step + 1, batches[-1].epoch, batches[-1].used
        epoch_ends = any(batch.used == len(groups_of(batch.epoch)) for batch in batches)
        bar.update()
        if broken := {(c.kind, c.key): c for batch in batches for c in batch.clips if c.reason}:
            data.dropped |= broken
            check_readable(data.dropped, cfg)
        if model.due(step, conf.log_interval, total):
            model.log_metrics(folder, writer, step, {
                **{n: float(window[n]) / max(1, window[f"n_{n}"]) for n in tuner.weights},
                "acc": float(window["right"]) / max(1, window["tokens"]), "lr": lr,
                "grad_norm": float(window["grad_norm"]) / window["steps"],
                "impossible": window["impossible"],
                "dropped": sum(not clip.seconds for clip in data.dropped.values()),
                "audio_s_per_s": window["audio_s"] / (time.time() - since),
                "gpu_gib": torch.cuda.max_memory_allocated() / 2**30,  # 0 without a GPU
            })  # fmt: skip
            window, since = Counter(), time.time()
        if epoch_ends or model.due(step, conf.validate_interval, total):
            scores, _ = evaluate(tuner, data, parts, run, conf.valid_clips)
            model.log_metrics(folder, writer, step, scores)
            score = rank_of(scores, tuner)
            idle, best = (0, score) if score < best else (idle + 1, best)
            old, kept = kept, sorted([*kept, [score, step]])[: conf.keep_nbest_models]
            if rank == 0 and [score, step] in kept:
                model.save(step_file(folder, step), trained_state(parts))
            for item in [item for item in old if item not in kept]:
                step_file(folder, item[1]).unlink(missing_ok=True)
        ends = epoch_ends or idle >= patience
        if rank == 0 and (ends or model.due(step, conf.save_checkpoint_interval, total)):
            model.check_gradient(norm, step)
            values = step, epoch, used, kept, idle, best, before, told
            values = *values, spent + time.time() - started
            state = dict(zip(names, values, strict=True)) | {"format": model.FORMAT, "world": world}
            state |= {"identity": identity, "config": OmegaConf.to_container(cfg)}
            state |= {"trained": trained_state(parts), "optimizer": optimizer.state_dict()["state"]}
            model.save(folder / "last.pt", state)
    bar.close()
    spent += time.time() - started
    about = {"before": before, "steps": step, "seconds": spent}
    finish(tuner, data, parts, run, kept, about, told, len(groups_of(0)) / conf.accum_grad)
    say(f"done: {step} steps, {spent:.0f} s -> {folder}")


def finish(tuner, data, parts, run, kept, about, told, epoch_steps):
    """Average the best checkpoints, keep the better of average and best, tell what has changed."""
    cfg, folder, nano, average, found = tuner.cfg, Path(tuner.cfg.output_dir), tuner.nano, {}, {}
    if run.world > 1:
        dist.barrier()  # until the last checkpoint is written
    paths = [step_file(folder, n) for _, n in kept[: cfg.train_conf.avg_nbest_model]]
    for path in paths:
        for name, value in model.read_weights(path).items():
            average[name] = average.get(name, 0.0) + value / len(paths)
    states = {"best": model.read_weights(paths[0]), "average": average}
    for name, state in states.items():
        load_tensors(nano, nano.state_dict() | state, name)
        known = len(paths) == 1 and found.get("best")  # of one checkpoint it is the average
        found[name] = known or evaluate(tuner, data, parts, run)
    chosen = min(found, key=lambda name: rank_of(found[name][0], tuner))
    shared = [data.dropped] * run.world
    if run.world > 1:
        dist.all_gather_object(shared, data.dropped)
    if run.rank > 0:
        return
    dropped = {key: clip for part in shared for key, clip in part.items()}.values()
    rows = [{"key": c.key, "source": str(c.source), "reason": c.reason} for c in dropped]
    model.save(folder / "dropped.jsonl", rows)
    model.save(folder / "avg.pt", average)
    model.save(folder / "trained.pt", states[chosen])
    content = {"format": model.FORMAT, "script": "finetune_encoder", "base": parts.base}
    content |= {"base_hash": parts.base_hash, "conf": OmegaConf.to_container(cfg)}
    hours = Counter()
    for clip in data.train:
        hours[clip.kind] += clip.seconds / 3600
    content["hours"] = hours
    content |= {"ctc_symbols": parts.ctc_tokenizer and parts.ctc_tokenizer.symbols}
    model.save(folder / "config.json", content)
    after, rows = found[chosen]
    about |= {"details": {"before": told, "after": details(rows)}}
    table = ["| set, read-out | before | after |", "|---|---|---|"]
    for label, value in about["details"]["after"].items():
        table.append(f"| {label} | {cell(told.get(label))} | {cell(value)} |")
    gib = torch.cuda.max_memory_allocated() / 2**30 or (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )
    notes = ["(substituted/deleted/inserted)", f"{about['seconds']:.0f} s, {gib:.1f} GiB"]
    notes += expected(folder, kept, epoch_steps)
    rows = [(c, (ctc if llm is None else llm) or "") for c, llm, ctc in rows if c.kind in SETS]
    rows.sort(key=lambda row: -model.error_rate([row[0].target], [row[1]])["rate"])
    worst = [f"{c.key} ({c.kind}): {c.target!r} -> {text!r}" for c, text in rows[:20]]
    print(
        "\n".join(
            [*table, *notes, f"the {chosen} of steps {[n for _, n in kept]}; worst:", *worst[:5]]
        )
    )
    model.save(folder / "table.md", "\n".join([*table, "", *notes]) + "\n")
    model.save(folder / "worst.txt", "\n".join(worst) + "\n")
    plot_curves(folder)
    content = about | {name: scores for name, (scores, _) in found.items()}
    content |= {"after": after, "chosen": chosen, "gib": gib}
    model.save(folder / "results.json", content)  # the last: now the run is finished


def expected(folder, kept, epoch_steps):
    """This run beside what the guide leads one to expect; lines of text."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["ce"] for row in rows if "ce" in row]
    if not losses:
        return []
    lower = 100 * (1 - losses[-1] / losses[0])
    epoch = math.ceil(kept[0][1] / epoch_steps)
    return [f"first loss {losses[0]:.2f} (expected 2 to 3), {lower:.0f} % lower at the end (30 to "
            f"50), best in epoch {epoch} (5 to 15)"]  # fmt: skip


def plot_curves(folder):
    """Losses and error rates over the steps."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(name for row in rows for name in row):
        axis = right if name.endswith("_er") else left if name in ("ce", "ctc", "distill") else None
        if axis is not None:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points, strict=True), label=name)
            axis.legend()
    left.set(xlabel="optimizer step", ylabel="loss, nats per label", yscale="log")
    right.set(xlabel="optimizer step", ylabel="error rate")
    model.save_atomic(folder / "curves.png", lambda file: figure.savefig(file, format="png"))


# ---- on to infer.py, and back to FunASR and transformers (merge.py) ---------


def load_listener(folder, cfg, device, dtype):
    """infer.py's listener (see there) of a run folder, or of a released or merged folder, funasr's
    or transformers'."""
    run, moved = read_run(folder), cfg.encoder.name if Path(cfg.encoder.name).exists() else ""
    path = folder / "config.yaml"  # the hub's folder of transformers has none, but its sizes
    text = path.read_text(encoding="utf-8") if path.is_file() else DEFAULTS
    conf = run["conf"] if run else OmegaConf.to_container(OmegaConf.create(text))
    with_llm = cfg.decode.readout != "ctc" and conf["llm"] != "none"
    start = folder if run else base_file(folder)
    parts = load_parts(conf, start, dtype, with_llm, moved=moved)
    nano, tokenizer, ctc = model.freeze(parts.nano).to(device), parts.tokenizer, parts.ctc_tokenizer
    if not with_llm and ctc is None:
        raise model.UserError(f"{folder}: has no CTC branch to read")

    def hear(feats, lens):
        with torch.autocast(device.type, enabled=False):  # only the LLM is bf16, as in FunASR
            return nano.hear(*nano.encode(feats, lens)), None

    def prompt(row):
        given = {"hotwords": cfg.hotwords, "language": cfg.language, "prompt": cfg.prompt}
        row = row | {key: value for key, value in given.items() if value}
        itn = conf.get("dataset_conf", {}).get("prompt_conf", {}).get("itn", True)
        return nano.prompt(tokenizer, *row_prompt(row, itn=itn))

    def spell(text):
        found, known, classes = [], "", ctc.encode(text)
        for count, label in enumerate(classes, start=1):  # a rare character is several tokens
            so_far = ctc.decode(classes[:count]).rstrip("\ufffd")
            found.append((label, so_far[len(known) :]))
            known = so_far
        return found

    adapted = isinstance(nano, AdaptedLLM)
    below = nano.audio_adaptor if adapted else nano.ctc_decoder  # of the CTC head
    stack = below.stack if below is not None else 1
    return SimpleNamespace(
        encoder=parts.frontend, hear=hear, prompt=prompt, llm=nano.llm, tokenizer=tokenizer,
        stop_id=tokenizer and nano.stop_id(tokenizer), spell=spell,
        read_ctc=ctc and (lambda path: ctc.decode(path).strip()), blank=ctc and nano.ctc.blank,
        position_s=stack * parts.frontend.frame_ms / 1000, about=f"{folder}, {parts.base}",
        ctc=nano.ctc if adapted else None,  # over the LLM's tokens
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["merge"]:
        if not Path(__file__).with_name("merge.py").is_file():
            sys.exit("error: needs merge.py beside finetune_encoder.py")
        arguments, sys.argv[1:] = sys.argv[2:], ["output_dir=merged"]
        command = functools.partial(importlib.import_module("merge").main, arguments)
        model.run_main(lambda _: command(), DEFAULTS, __doc__)
    else:
        model.run_main(main, DEFAULTS, __doc__, "dataset_conf.batch_size")
