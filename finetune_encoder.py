"""Adapt Fun-ASR-Nano's encoder to telephone speech, by FunASR's own keys; errors before and after.

    python finetune_encoder.py configs/stage1.yaml [key=value ...]         # ++key=value works too
    python finetune_encoder.py configs/telephone_8k.yaml configs/telephone_8k_from_hub.yaml
    torchrun --nproc_per_node 4 finetune_encoder.py configs/stage1.yaml
    python finetune_encoder.py configs/stage1.yaml --check                 # all but the training
    python finetune_encoder.py merge runs/stage1 Fun-ASR-Nano-2512/model.pt -o merged/

Loss    llm_weight x cross-entropy of the transcript through the LLM, smoothed by lsm_weight
        + ctc_weight x CTC, which reaches the encoder unless detach_ctc_decoder
        + distill_weight x squared distance of what the encoder makes of speech on the simulated
          line to what the encoder that the run began with makes of the same speech, clean;
        each summed over the step of all processes and divided by its labels (or frames).
Data    train_data_set_list: telephone speech; telephone_conf.data_set_list: clean speech that goes
        through a simulated line; clean_data_set_list: rehearsal, data_mix of an epoch. Manifests as
        model.read_manifest takes them, or FunASR's .list of .jsonl files; commas between.
Input   the released folder (model.pt, multilingual.tiktoken, Qwen3-0.6B/); or a Whisper, which
        gets a CTC head over the characters or words of the training transcripts
Output  output_dir/trained.pt   what has changed: the better of the best checkpoint and the average
        output_dir/config.json  all else that infer.py and `merge` need, with the base's hash
        output_dir/last.pt      to resume; step-*.pt and avg.pt: the best checkpoints
        output_dir/results.json, table.md, worst.txt, curves.png, dropped.jsonl, metrics.jsonl
Units   dataset_conf's lengths count 10 ms frames of audio plus text tokens; SpecAug's time masks
        count feature frames, which are 60 ms here and 10 ms with Whisper.
Papers  SpecAugment 1904.08779, CTC (Graves 2006), packet loss as a Markov chain (Gilbert 1960)
Source  what keys are called and mean, and the layers: funasr 1.4.16. It parses ctc_weight,
        detach_ctc_decoder, lsm_weight and specaug, but trains on the cross-entropy alone.
Logged  ce (nats per label token), acc, ctc (nats per CTC label), distill (squared distance per
        frame and dimension), impossible (clips with more CTC labels than frames), dropped, lr,
        grad_norm, audio_s_per_s, memory_gib; of telephone, simulated and clean validation clips
        SET_llm_er and SET_ctc_er (WER, or CER for Chinese), SET_ce, SET_ctc, SET_distill
"""

import base64
import contextlib
import copy
import functools
import io
import json
import math
import os
import random
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
import yaml
from omegaconf import OmegaConf
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import model

DEFAULTS = """
# The values of the release; keys that FunASR does not have are marked +.
model: FunASRNano        # where init_param does not say it: hub name or folder of the whole model
init_param: null         # model.pt, its folder, or + a run folder of this script to go on from
model_conf:
  lsm_weight: 0.1        # label smoothing of the cross-entropy
  length_normalized_loss: true  # losses per label; false: per clip
audio_encoder: SenseVoiceEncoderSmall  # + or a Whisper, by hub name or folder
audio_encoder_conf:
  output_size: 512
  attention_heads: 4
  linear_units: 2048
  num_blocks: 50
  tp_blocks: 20
  freeze: true
  freeze_layer_num: -1   # > 0: so many blocks from below stay frozen
  activation_checkpoint: false  # computes a third more, for most of the memory
  dropout_rate: 0.1
  positional_dropout_rate: 0.1
  attention_dropout_rate: 0.1
  input_layer: pe
  pos_enc_class: SinusoidalPositionEncoder
  normalize_before: true
  kernel_size: 11
  sanm_shfit: 0
  selfattention_layer_type: sanm
  feat_permute: true
llm: Qwen3-0.6b          # none: no LLM in memory, CTC and distillation only
llm_conf:
  hub: hf
  freeze: true
  llm_dtype: bf16        # or fp32; of a frozen LLM on a GPU, all else takes fp32
  init_param_path: Qwen3-0.6B  # folder of its configuration, beside model.pt
  use_lora: false        # beside a frozen LLM
  lora_conf:
    freeze_lora: true
    task_type: CAUSAL_LM
    r: 16
    lora_alpha: 32
    lora_dropout: 0.05
    bias: none
    target_modules: [q_proj, v_proj]
    init_param_path: null
llm_weight: 1.0          # +
audio_adaptor: Transformer
audio_adaptor_conf:
  downsample_rate: 1
  use_low_frame_rate: true
  ffn_dim: 2048
  llm_dim: 1024
  encoder_dim: 512
  n_layer: 2
  freeze: true
ctc_decoder: Transformer
ctc_decoder_conf:
  downsample_rate: 1
  ffn_dim: 2048
  llm_dim: 512
  encoder_dim: 512
  n_layer: 5
  freeze: false          # decoder and head
detach_ctc_decoder: true # true: CTC trains its own branch and never reaches the encoder
ctc_weight: 1.0
ctc_conf:
  dropout_rate: 0.0
  ctc_type: builtin
  reduce: true
  ignore_nan_grad: true
distill_weight: 0.0      # +
frontend: WavFrontend
frontend_conf:
  fs: 16000              # or 8000, for telephone speech as it is; other rates are resampled
  mel_axis: pretrained   # + at 8000: pretrained, or native, FunASR's warped one
  dither: 1.0            # + FunASR's default, in inference too
  window: hamming
  n_mels: 80
  frame_length: 25
  frame_shift: 10
  lfr_m: 7
  lfr_n: 6
  cmvn_file: null
specaug: null            # or SpecAugLFR
specaug_conf:
  apply_time_warp: false
  time_warp_window: 5
  apply_freq_mask: true
  freq_mask_width_range: [0, 20]
  lfr_rate: 6
  num_freq_mask: 2
  apply_time_mask: true
  time_mask_width_range: [0, 10]
  num_time_mask: 2
  time_mask_max_ratio: 0.1  # + no time mask is longer than this share of its clip
  fill: mean             # + the clip's mean, or zero as in FunASR, which is below any silence
telephone_conf:          # + the simulated line
  data_set_list: []      # clean speech that always goes through it
  prob: 0.0              # share of train_data_set_list's clips that go through it too
  band_prob: 1.0         # 300-3400 Hz
  noise_prob: 0.5        # white noise
  snr_db: [5.0, 30.0]
  level_prob: 1.0
  level_db: [-30.0, 0.0] # peak, dBFS
  codec_prob: 1.0
  codecs: [mulaw, alaw, gsm]  # one of them is drawn
  packet_loss_prob: 0.5  # share of the clips that lose packets
  packet_loss_rate: [0.01, 0.05]  # share of their 20 ms packets
  packet_loss_burst: 2.0 # packets lost in a row, on average
data_mix: 0.0            # + share of an epoch that is clean rehearsal
train_conf:
  use_lora: false
  accum_grad: 1
  grad_clip: 5.0         # of the gradient's norm; 0: off
  max_epoch: 2
  max_steps: 0           # + > 0: exactly so many, whatever max_epoch says
  keep_nbest_models: 200
  log_interval: 100      # steps; 0: never, as of the next two
  validate_interval: 2000  # also at the end of every epoch, and so is the next
  save_checkpoint_interval: 2000
  avg_nbest_model: 100
  early_stopping_patience: 0  # > 0: stop after so many validations without a better score
  valid_decode: 200      # + clips of each set that the LLM transcribes; at the end all
  use_bf16: false
  use_deepspeed: true
  deepspeed_config: null
  save_init_model: false
  effective_save_name_excludes: [llm.]
  resume: true
optim: adamw
optim_conf:
  lr: 5.0e-6             # peak
  ctc_lr: 0.0            # + of CTC decoder and head; 0: as lr
  layer_decay: 1.0       # + rate of an encoder block over that of the one above it
  weight_decay: 0.0      # not on norms and biases
  betas: [0.9, 0.999]
scheduler: warmuplr
scheduler_conf:
  warmup_steps: 2500
dataset: FunASR
dataset_conf:
  index_ds: FunASR
  batch_sampler: BatchSampler
  batch_type: token      # token (frames + text), length (frames) or example
  batch_size: 6000       # of that unit, padding included, per process
  batch_size_sample_max: 10     # clips of a batch
  batch_size_token_max: 6000    # LLM positions of a batch, padding included
  batch_size_scale_ratio_max: 2.0
  batch_size_scale_threshold: 3000
  max_token_length: 3500 # longer clips are counted and named
  max_source_length: 12000
  min_source_length: 10
  max_target_length: 2048
  shuffle: true
  sort_size: 1024
  num_workers: 4
  speed_perturb: [1.0]   # + factors, of which one is drawn for a training clip
  audio_adaptor_downsample_rate: ${audio_adaptor_conf.downsample_rate}
  audio_encoder_downsample_rate: 6
  data_split_num: 256
  retry: 2000            # stop when more clips than this cannot be read
  prompt_classes: MultiContextPrompt
  prompt_conf:
    max_neg_hotwords_num: 0
    min_neg_hotwords_num: 0
    use_hist: false
    use_one_pass_result: true
    use_hotwords: true   # those of a clip's field `hotwords`
    use_asr_hotwords: true
    chinese_hotwords_list: null
    english_hotwords_list: null
  ctc_tokenizer: SenseVoiceTokenizer  # + char or word, with Whisper
  ctc_target_normalize: true    # lower case, no punctuation
  ctc_tokenizer_conf:
    vocab_path: null     # null: multilingual.tiktoken beside model.pt
    is_multilingual: true
    num_languages: 8749
  use_dynamic_output_ratio: 0.0
tokenizer: HuggingfaceTokenizer
tokenizer_conf:
  init_param_path: ${llm_conf.init_param_path}
  unk_symbol: <unk>
enable_tf32: true
debug: false
train_data_set_list: []
valid_data_set_list: []
clean_data_set_list: []        # + clean rehearsal
clean_valid_data_set_list: []  # + scored as it is, and through the simulated line
output_dir: ???
seed: 0                  # +
device: auto             # + auto, cpu or cuda
"""

ONLY = """
audio_adaptor ctc_decoder frontend frontend_conf.window frontend_conf.n_mels
frontend_conf.frame_length frontend_conf.frame_shift frontend_conf.lfr_m frontend_conf.lfr_n
specaug_conf.apply_time_warp optim scheduler dataset dataset_conf.index_ds dataset_conf.shuffle
audio_encoder_conf.input_layer audio_encoder_conf.pos_enc_class audio_encoder_conf.normalize_before
audio_encoder_conf.sanm_shfit audio_encoder_conf.selfattention_layer_type ctc_conf.ctc_type
tokenizer llm_conf.lora_conf.bias llm_conf.lora_conf.init_param_path
"""  # keys of which the default is all that is implemented: another value stops the run

NO_EFFECT = """
audio_encoder_conf.positional_dropout_rate: the released encoder has no dropout on its positions
audio_encoder_conf.feat_permute: features are (batch, time, bins) always
llm_conf.hub: the LLM's files lie in the model's own folder
llm_conf.lora_conf.freeze_lora: LoRA trains whenever llm_conf.use_lora is true
llm_conf.lora_conf.task_type: the LLM is a causal one
train_conf.use_lora: llm_conf.use_lora decides
ctc_conf.reduce: the loss is summed, and divided by the labels of the whole step
ctc_conf.ignore_nan_grad: clips with more labels than frames are left out; a NaN stops the run
specaug_conf.time_warp_window: there is no time warp
train_conf.deepspeed_config: DeepSpeed is not used
train_conf.save_init_model: the base stays where it is; a run names it and its hash
train_conf.effective_save_name_excludes: what changed is saved; `merge` writes the whole model
dataset_conf.batch_sampler: FunASR maps every name to one sampler; batch_type decides
dataset_conf.batch_size_scale_ratio_max: FunASR reads it nowhere
dataset_conf.batch_size_scale_threshold: FunASR reads it nowhere
dataset_conf.sort_size: pools of like clips are as large as keeps padding at 3 %
dataset_conf.audio_adaptor_downsample_rate: audio_adaptor_conf.downsample_rate decides
dataset_conf.audio_encoder_downsample_rate: FunASR reads it nowhere; a frame has 60 ms
dataset_conf.data_split_num: an epoch is one pass; FunASR makes so many passes over one .jsonl
dataset_conf.use_dynamic_output_ratio: FunASR reads it and does nothing with it
dataset_conf.prompt_classes: the prompt is that of inference; FunASR trains with another one
dataset_conf.prompt_conf.max_neg_hotwords_num: no hotwords are made up
dataset_conf.prompt_conf.min_neg_hotwords_num: no hotwords are made up
dataset_conf.prompt_conf.use_hist: the prompt of inference has no history
dataset_conf.prompt_conf.use_one_pass_result: the prompt of inference has no first-pass result
dataset_conf.prompt_conf.use_asr_hotwords: a clip's names stand in its field `hotwords`
dataset_conf.prompt_conf.chinese_hotwords_list: no hotwords are made up
dataset_conf.prompt_conf.english_hotwords_list: no hotwords are made up
dataset_conf.ctc_tokenizer_conf.is_multilingual: the release's tokenizer is the multilingual one
dataset_conf.ctc_tokenizer_conf.num_languages: special tokens are never targets
tokenizer_conf.init_param_path: the tokenizer lies beside the LLM's configuration
tokenizer_conf.unk_symbol: a byte-level tokenizer knows every text; FunASR ignores the key
debug: there is no debug mode
"""  # keys that are accepted and change nothing, and why
ANSWERS = dict(line.split(": ", 1) for line in NO_EFFECT.strip().splitlines())

SANM = "SenseVoiceEncoderSmall"
CTC_PREFIXES = ("ctc_decoder.", "ctc.")  # the branch that Hugging Face's model.pt lacks
SENSEVOICE_SPECIALS = 1679  # special tokens behind the ranks of multilingual.tiktoken
CODECS = {"mulaw": "ULAW", "alaw": "ALAW", "gsm": "GSM610"}  # libsndfile's names
SETS = ("telephone", "simulated", "clean")  # clips as they are, on the simulated line, clean


def check(cfg):
    """Refuse values that are not implemented, and those that cannot work."""
    default, conf = OmegaConf.create(DEFAULTS), cfg.telephone_conf
    for key in ONLY.split():
        only, value = OmegaConf.select(default, key), OmegaConf.select(cfg, key)
        if value != only:
            raise model.UserError(f"{key}: only {only!r} is implemented, got {value!r}")
    if cfg.train_conf.use_deepspeed:
        several = "several GPUs: torchrun; too little memory: train_conf.use_bf16=true, "
        raise model.UserError(
            "train_conf.use_deepspeed: DeepSpeed is not used here, set it to false; " + several
            + "audio_encoder_conf.activation_checkpoint=true, a smaller dataset_conf.batch_size"
        )  # fmt: skip
    model.one_of(("token", "length", "example"), cfg, "dataset_conf.batch_type")
    model.one_of(("SenseVoiceTokenizer", "char", "word"), cfg, "dataset_conf.ctc_tokenizer")
    model.one_of(("bf16", "fp32"), cfg, "llm_conf.llm_dtype")
    model.one_of(("Qwen3-0.6b", "none"), cfg, "llm")
    if cfg.specaug not in (None, "", "SpecAugLFR"):
        raise model.UserError(f"specaug: expected null or SpecAugLFR, got {cfg.specaug!r}")
    if cfg.llm_conf.use_lora and not cfg.llm_conf.freeze:
        raise model.UserError("llm_conf.use_lora: LoRA trains beside a frozen LLM; set freeze=true")
    if not 0 <= cfg.data_mix < 1:
        raise model.UserError(f"data_mix is a share below 1, got {cfg.data_mix}")
    if not 0 < cfg.optim_conf.lr < 0.1:
        raise model.UserError(f"optim_conf.lr={cfg.optim_conf.lr:g} is no rate for AdamW")
    if unknown := set(conf.codecs) - set(CODECS):
        raise model.UserError(
            f"telephone_conf.codecs: {min(unknown)} is none of {', '.join(CODECS)}"
        )
    for key in ("snr_db", "level_db", "packet_loss_rate"):
        pair = list(conf[key])
        if len(pair) != 2 or pair[0] > pair[1] or key == "packet_loss_rate" and pair[1] >= 1:
            raise model.UserError(f"telephone_conf.{key}: expected [lowest, highest], got {pair}")
    sizes = ("batch_size", "batch_size_sample_max", "batch_size_token_max")
    model.at_least(1, cfg, *(f"dataset_conf.{name}" for name in sizes))
    names = ("accum_grad", "max_epoch", "keep_nbest_models", "avg_nbest_model")
    model.at_least(1, cfg, "telephone_conf.packet_loss_burst", *(f"train_conf.{n}" for n in names))
    names = ("log", "validate", "save_checkpoint")
    model.at_least(0, cfg, "train_conf.grad_clip", *(f"train_conf.{n}_interval" for n in names))
    model.at_least(0, cfg, "dataset_conf.num_workers", "scheduler_conf.warmup_steps")
    if min(cfg.dataset_conf.speed_perturb, default=0) <= 0:
        raise model.UserError("dataset_conf.speed_perturb: expected factors above 0")


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
        wave = through_codec(wave, rng.choice(list(conf.codecs)))
    if rng.random() < conf.packet_loss_prob:
        wave = lose_packets(wave, rng.uniform(*conf.packet_loss_rate), conf.packet_loss_burst, rng)
    return wave


def through_codec(wave, codec):
    """Encode and decode 8 kHz speech with libsndfile: G.711 mu-law or A-law, or GSM 06.10."""
    file = io.BytesIO()
    soundfile.write(file, wave.clamp(-1, 1).numpy(), 8000, format="WAV", subtype=CODECS[codec])
    file.seek(0)
    decoded = torch.from_numpy(soundfile.read(file, dtype="float32")[0])
    return F.pad(decoded, (0, max(0, len(wave) - len(decoded))))[: len(wave)]  # GSM: 20 ms blocks


def lose_packets(wave, rate, burst, rng):
    """Silence 20 ms packets by a two-state chain: `rate` of them, `burst` in a row on average."""
    lost, wave = rng.random() < rate, wave.clone()
    for first in range(0, len(wave), 160):
        if lost:
            wave[first : first + 160] = 0.0
        lost = rng.random() < (1 - 1 / burst if lost else rate / (1 - rate) / burst)
    return wave


# ---- Fun-ASR-Nano: front end, tokenizers, layers, prompt --------------------


@functools.cache
def mel_filters():
    """Kaldi's 80 mel filters over the 31.25 Hz bins of 512 points at 16 kHz: (256, 80)."""
    warp = 100.0, -500.0, 1.0  # of vocal tract length, off
    return torchaudio.compliance.kaldi.get_mel_banks(80, 512, 16000.0, 20.0, 0.0, *warp)[0].T


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
    narrow, wide = (torch.hamming_window(n, periodic=False) for n in (200, 400))
    hz = torch.arange(256) * 31.25
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(model.hash_text(key)[:15], 16))
        power = torchaudio.compliance.kaldi.spectrogram(
            wave.float()[None] * 32768, sample_frequency=8000.0, window_type="hamming",
            dither=dither * 0.5**0.5,  # at half the rate half the variance is the same noise a Hz
        ).exp()  # fmt: skip  # (T, 129)
        uniform = torch.rand(len(power), 127)

    def pre_emphasis(rate):
        return 1 + 0.97**2 - 2 * 0.97 * torch.cos(2 * math.pi * hz / rate)  # |1 - 0.97 z^-1|^2

    gain = pre_emphasis(16000) / pre_emphasis(8000) * (wide.sum() / narrow.sum()) ** 2
    level = dither**2 * (wide**2).sum() * pre_emphasis(16000)
    noise = level[129:] * -uniform.clamp(min=1e-30).log()  # power of Gaussian noise
    energies = torch.cat([power * gain[:129], noise], dim=1) @ mel_filters()  # (T, 80)
    return energies.clamp(min=torch.finfo(torch.float32).eps).log()


class NanoFrontend:
    """Audio to features of Fun-ASR-Nano, 60 ms a frame: (N,) at sample_rate -> (T, 560).

    fs 16000: as FunASR. fs 8000: on the `pretrained` mel axis (telephone_fbank), or on FunASR's
    own warped one (`native`), about 1 nat off what the released encoder was trained on.
    """

    frame_ms = 60.0

    def __init__(self, fs=16000, mel_axis="native", dither=1.0, cmvn_file=None, **_):
        if fs not in (8000, 16000) or mel_axis not in ("pretrained", "native"):
            got = f"got fs={fs}, mel_axis={mel_axis}"
            raise model.UserError(
                f"frontend_conf: fs 8000, 16000; mel_axis pretrained, native; {got}"
            )
        self.sample_rate, self.mel_axis, self.dither = fs, mel_axis, dither
        self.cmvn = model.load_cmvn(cmvn_file) if cmvn_file else None

    def features(self, wave, key=""):
        if self.sample_rate == 16000 or self.mel_axis == "native":
            feats = model.kaldi_fbank(wave, self.sample_rate, key, self.dither)
        else:
            feats = telephone_fbank(wave, key, self.dither)
        feats = model.apply_lfr(feats)
        return feats if self.cmvn is None else (feats + self.cmvn[0]) * self.cmvn[1]

    def out_lens(self, lens):
        return lens


class SenseVoiceTokenizer:
    """multilingual.tiktoken: text <-> CTC classes; special tokens are no targets, never read."""

    def __init__(self, path):
        import tiktoken

        if not Path(path).is_file():
            where = "it lies beside ModelScope's model.pt, and CTC needs it"
            raise model.UserError(f"{path}: no such file; {where}")
        lines = [line.split() for line in Path(path).read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        rest = {"mergeable_ranks": ranks, "special_tokens": {}}
        self.coder = tiktoken.Encoding("multilingual", pat_str=pattern, **rest)
        self.ranks, self.classes = len(ranks), len(ranks) + SENSEVOICE_SPECIALS
        self.symbols = None

    def encode(self, text):
        return self.coder.encode_ordinary(text)

    def decode(self, classes):
        return self.coder.decode([c for c in classes if c < self.ranks])


class SymbolTokenizer:
    """Characters or words as CTC classes, for an encoder without a head of its own."""

    def __init__(self, kind, symbols):
        self.kind, self.symbols, self.classes = kind, list(symbols), len(symbols)
        self.class_of = {symbol: number for number, symbol in enumerate(self.symbols)}

    @classmethod
    def of_texts(cls, kind, texts):
        return cls(kind, sorted({symbol for text in texts for symbol in cls.split(kind, text)}))

    @staticmethod
    def split(kind, text):
        return list(text) if kind == "char" else text.split()

    def encode(self, text):
        """Classes of the symbols that the training transcripts had; others are left out."""
        return [self.class_of[s] for s in self.split(self.kind, text) if s in self.class_of]

    def decode(self, classes):
        return ("" if self.kind == "char" else " ").join(self.symbols[c] for c in classes)


class FunASRAttention(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.heads = heads
        self.linear_q, self.linear_k = nn.Linear(size, size), nn.Linear(size, size)
        self.linear_v, self.linear_out = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x, mask):
        projected = self.linear_q(x), self.linear_k(x), self.linear_v(x)
        split = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in projected]
        attended = F.scaled_dot_product_attention(*split, attn_mask=mask[:, None, None])
        return self.linear_out(attended.transpose(1, 2).flatten(2))


class FunASRBlock(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.self_attn = FunASRAttention(size, heads)
        self.feed_forward = model.SANMFeedForward(size, size // 4, 0.0)
        self.norm1, self.norm2 = (nn.LayerNorm(size, eps=1e-12) for _ in range(2))

    def forward(self, x, mask):
        x = x + self.self_attn(self.norm1(x), mask)
        return x + self.feed_forward(self.norm2(x))


class FunASRTransformer(nn.Module):
    """FunASR's `Transformer`, adaptor and CTC decoder of the release: Linear-ReLU-Linear, blocks.

    Input   x (B, T, encoder_dim), lens (B,) on the CPU.
    Output  (B, ceil(T / k), llm_dim), lens (B,); k = downsample_rate. Rows past lens mean nothing;
            padding, even NaN, never reaches a real one.
    Source  funasr/models/llm_asr/adaptor.py, whose state-dict names it keeps. There are neither
            positions nor a norm at the end.
    """

    def __init__(
        self, downsample_rate=1, encoder_dim=512, llm_dim=1024, ffn_dim=2048, n_layer=2,
        attention_heads=8, **_,
    ):  # fmt: skip
        super().__init__()  # FunASR's sections have more keys, such as freeze
        self.stack, self.width = downsample_rate, llm_dim
        self.linear1 = nn.Linear(encoder_dim * downsample_rate, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, llm_dim)
        self.blocks = nn.ModuleList([FunASRBlock(llm_dim, attention_heads) for _ in range(n_layer)])

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

    def __init__(self, width, size, dropout=0.0):
        super().__init__()
        self.ctc_lo, self.blank, self.dropout = nn.Linear(width, size), size - 1, dropout

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # in bf16 they would be off by 1 %
            x = F.dropout(x.float(), self.dropout, self.training)
            return self.ctc_lo(x).log_softmax(-1)


def llm_positions(frames):
    """How many adaptor frames the LLM sees, about T / 8: 480 ms a position.

    FunASR's `use_low_frame_rate`: nothing is pooled. The adaptor keeps all T frames and the LLM
    gets the first n, into which encoder and adaptor have learned to pack the clip; all T would be
    out of distribution for the release. frames: a number, an array or a tensor.
    """
    for _ in range(3):  # as three convolutions of stride 2 would leave
        frames = (frames - 1) // 2 + 1
    return frames


class FunASRNano(nn.Module):
    """Fun-ASR-Nano: encoder, adaptor, Qwen3; beside them a CTC decoder and its head, 868.9 M.

    Any part but the encoder may be None. Names of the state dict are the release's.
    Source  funasr/models/fun_asr_nano/model.py, equal to it within 1e-4.
    """

    def __init__(self, audio_encoder, audio_adaptor=None, llm=None, ctc_decoder=None, ctc=None,
                 low_frame_rate=True):  # fmt: skip
        super().__init__()
        self.audio_encoder, self.audio_adaptor, self.llm = audio_encoder, audio_adaptor, llm
        self.ctc_decoder, self.ctc, self.low_frame_rate = ctc_decoder, ctc, low_frame_rate

    def blocks(self):
        """Blocks of the encoder, from input to output."""
        net = self.audio_encoder
        if isinstance(net, model.SenseVoiceEncoder):
            return [*net.encoders0, *net.encoders, *net.tp_encoders]
        return [*net.layers]

    def encode(self, feats, lens):
        """(B, T, F) -> enc (B, T', W) fp32, lens (B,)."""
        enc, lens = self.audio_encoder(feats, lens)
        return enc.float(), lens

    def listen(self, enc, lens):
        """What the LLM hears: the first llm_positions(T) frames of the adaptor. (B, n, D), (B,)."""
        emb, emb_lens = self.audio_adaptor(enc, lens)
        heard = llm_positions(lens) if self.low_frame_rate else emb_lens
        if bool((heard > emb_lens).any()):
            key = "audio_adaptor_conf.downsample_rate"
            raise model.UserError(f"{key}: other than 1 does not go with use_low_frame_rate")
        return emb[:, : int(heard.max())], heard

    def ctc_log_probs(self, enc, lens):
        """(B, T, W) -> log-probabilities (B, T, V + 1) fp32, lens; the blank is the last class."""
        if self.ctc_decoder is not None:
            enc, lens = self.ctc_decoder(enc, lens)
        return self.ctc(enc), lens

    def hear(self, enc, lens):
        """enc, lens -> model.Heard, without what there is no part for."""
        speech, speech_lens = (None, None) if self.llm is None else self.listen(enc, lens)
        heard = model.Heard(speech, speech_lens, lens)
        if self.ctc is not None:
            heard.log_probs, heard.lens = self.ctc_log_probs(enc, lens)
            best = heard.log_probs.argmax(-1).cpu()
            heard.paths = model.ctc_paths(best, heard.lens, self.ctc.blank)
        return heard


@functools.lru_cache(1024)
def nano_prompt(tokenizer, language="", hotwords="", instruction=""):
    """The prompt of FunASR's inference, as (before, after) token ids around the audio.

    FunASR trains with another header; here training and inference share this.
    """
    text = ""
    if names := ", ".join(model.as_list(hotwords or "")):
        text = "请结合上下文信息，更加准确地完成语音转写任务。如果没有相关信息，我们会留空。\n\n\n"
        text += f"**上下文信息：**\n\n\n热词列表：[{names}]\n"
    text += instruction or (f"语音转写成{language}：" if language else "语音转写：")
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    halves = f"{system}<|im_start|>user\n{text}", "<|im_end|>\n<|im_start|>assistant\n"
    return tuple(tokenizer(half, add_special_tokens=False)["input_ids"] for half in halves)


# ---- loading ----------------------------------------------------------------


@dataclass
class Parts:
    """A model with all that belongs to it, and where it comes from."""

    nano: FunASRNano
    frontend: object  # features(wave, key), out_lens, sample_rate, frame_ms
    tokenizer: object = None  # the LLM's
    ctc_tokenizer: object = None
    base: Path | None = None  # model.pt
    base_hash: str = ""
    first: dict = field(default_factory=dict)  # tensors of the run that it goes on from
    random_ctc: bool = False


def read_run(folder):
    """config.json of a run folder of this script; {} for anything else."""
    if not folder or not (Path(folder) / "trained.pt").is_file():
        return {}
    run = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if run.get("format") != model.FORMAT or run.get("script") != "finetune_encoder":
        raise model.UserError(f"{folder}: made by an earlier layout, or by another script")
    return run


def read_base(path):
    """Tensors of a released, merged or FunASR-trained model.pt, memory-mapped."""
    weights = model.read_weights(path, mmap=True)
    weights = weights.get("state_dict", weights)
    if not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise model.UserError(f"{path}: not a plain state dict of tensors")
    return weights


def load_tensors(nano, weights, where, may_lack=()):
    """Copy tensors into the parts that nano has. UserError names what does not fit.

    may_lack    prefixes of names that need not be there; ("",) where only some parts are given.
    """
    own, parts = nano.state_dict(), {name for name, _ in nano.named_children()}
    weights = {name: value for name, value in weights.items() if name.split(".")[0] in parts}
    missing = [name for name in own if name not in weights and not name.startswith(may_lack)]
    unknown = [name for name in weights if name not in own]
    wrong = [
        f"{name} is {tuple(weights[name].shape)}, expected {tuple(value.shape)}"
        for name, value in own.items() if name in weights and weights[name].shape != value.shape
    ]  # fmt: skip
    for problem, names in (("of another size", wrong), ("missing", missing), ("unknown", unknown)):
        if names:
            found = f"{len(names)} tensors are {problem}: {'; '.join(names[:2])}"
            raise model.UserError(f"{where}: does not fit the configuration, {found}")
    nano.load_state_dict(weights, strict=False)


def load_qwen(folder, dtype):
    """Qwen3 with random weights, and its tokenizer: its own weights are in model.pt."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").is_file():
        raise model.UserError(f"{folder}: no config.json of the LLM (llm_conf.init_param_path)")
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if stop is None or len(tokenizer) > config.vocab_size:
        rows = f"{len(tokenizer)} tokens, <|im_end|> {stop}; the LLM has {config.vocab_size} rows"
        raise model.UserError(f"{folder}: the tokenizer is of another vocabulary: {rows}")
    llm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return llm, tokenizer


def load_nano(conf, base, llm_dtype, with_llm, new_ctc):
    """Fun-ASR-Nano of a model.pt. new_ctc: a file without CTC branch gets a random one."""
    weights = read_base(base)
    has_ctc = "ctc.ctc_lo.weight" in weights
    nano = FunASRNano(model.SenseVoiceEncoder(**conf["audio_encoder_conf"]))
    parts = Parts(nano, NanoFrontend(**conf["frontend_conf"]), base=base.resolve())
    if with_llm:
        folder = base.parent / conf["llm_conf"]["init_param_path"]
        nano.llm, parts.tokenizer = load_qwen(folder, llm_dtype)
        nano.audio_adaptor = FunASRTransformer(**conf["audio_adaptor_conf"])
        nano.low_frame_rate = conf["audio_adaptor_conf"]["use_low_frame_rate"]
    if has_ctc or new_ctc:
        settings = conf["dataset_conf"].get("ctc_tokenizer_conf", {})
        vocabulary = settings.get("vocab_path") or base.parent / "multilingual.tiktoken"
        parts.ctc_tokenizer, parts.random_ctc = SenseVoiceTokenizer(vocabulary), not has_ctc
        nano.ctc_decoder = FunASRTransformer(**conf["ctc_decoder_conf"])
        size, dropout = parts.ctc_tokenizer.classes + 1, conf["ctc_conf"]["dropout_rate"]
        nano.ctc = CTCOutput(nano.ctc_decoder.width, size, dropout)
    load_tensors(nano, weights, base, () if has_ctc else CTC_PREFIXES)
    parts.base_hash = model.hash_tensors(weights)
    return parts


def load_whisper(conf, name, symbols, texts):
    """A Whisper's encoder with a CTC head over `symbols`, or over those of the texts."""
    encoder, kind = model.load_encoder(name), conf["dataset_conf"]["ctc_tokenizer"]
    if not isinstance(encoder, model.WhisperEncoder) or kind == "SenseVoiceTokenizer":
        need = "dataset_conf.ctc_tokenizer is char or word"
        raise model.UserError(f"audio_encoder={name}: {SANM}, or a Whisper, whose {need}")
    if conf["frontend_conf"]["fs"] != 16000:
        raise model.UserError("frontend_conf.fs: a Whisper takes 16000")
    tokenizer = SymbolTokenizer(kind, symbols) if symbols else SymbolTokenizer.of_texts(kind, texts)
    head = CTCOutput(encoder.width, tokenizer.classes + 1, conf["ctc_conf"]["dropout_rate"])
    parts = Parts(FunASRNano(encoder, ctc=head), encoder, ctc_tokenizer=tokenizer)
    parts.base_hash, parts.random_ctc = encoder.identity["weights"], not symbols
    return parts


def load_parts(conf, start, llm_dtype=torch.float32, with_llm=True, new_ctc=False, texts=(),
               moved=""):  # fmt: skip
    """Load a model, and what a run has changed in it.

    Input   conf: FunASR's sections, of config.yaml, of a run's config.json or of ours; start:
            model.pt or a run folder (None: a Whisper as it is), whose base now lies at `moved`.
    Output  Parts, fp32 on the CPU, nothing frozen but an LLM beside LoRA.
    """
    run = read_run(start)
    if conf["audio_encoder"] == SANM:
        base = Path(moved or run["base"]) if run else Path(start)
        base = base / "model.pt" if base.is_dir() else base
        if not base.is_file():
            moved = (
                f"; {start} was trained on it: if it was moved, give encoder.name" if run else ""
            )
            raise model.UserError(f"{base}: no such file{moved}")
        new_ctc = new_ctc or run.get("ctc", False)
        parts = load_nano(conf, base, llm_dtype, with_llm, new_ctc)
    else:
        name = moved or run.get("encoder") or conf["audio_encoder"]
        parts = load_whisper(conf, name, run.get("ctc_symbols"), texts)
    if run and run["base_hash"] != parts.base_hash:
        found = f"its hash is {parts.base_hash}, in training it was {run['base_hash']}"
        raise model.UserError(f"{parts.base or name}: not what {start} was trained on; {found}")
    if parts.nano.llm is not None and conf["llm_conf"].get("use_lora"):
        import peft

        lora, llm = conf["llm_conf"]["lora_conf"], model.freeze(parts.nano.llm)
        settings = {key: lora[key] for key in ("r", "lora_alpha", "lora_dropout", "target_modules")}
        peft.get_peft_model(llm, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    if run:
        parts.first = model.read_weights(Path(start) / "trained.pt")
        load_tensors(parts.nano, parts.first, f"{start}/trained.pt", ("",))
        parts.random_ctc = False
    return parts


def find_start(cfg):
    """What init_param or model says: model.pt or a run folder; None: a Whisper as it is."""
    if cfg.init_param:
        path = Path(cfg.init_param)
        path = path / "model.pt" if path.is_dir() and not read_run(path) else path
        if not path.exists():
            raise model.UserError(f"init_param={cfg.init_param}: no such file")
        return path
    if cfg.audio_encoder != SANM:
        return None
    if cfg.model == "FunASRNano":
        where = "model.pt or its folder, or give model its hub name (configs/*_from_hub.yaml)"
        raise model.UserError(f"init_param: say where the weights are, {where}")
    return model.find_model(cfg.model) / "model.pt"


def load_for_training(cfg, device):
    """Parts as the configuration asks for them, frozen where it says so."""
    specs = [*cfg.train_data_set_list, *cfg.telephone_conf.data_set_list, *cfg.clean_data_set_list]
    texts = []
    if cfg.audio_encoder != SANM:
        rows = [model.read_manifest(spec, manifests(cfg)) for spec in list_files(specs)]
        texts = {ctc_text(text or "", cfg) for part in rows for text in part["target"]}
    half = device.type == "cuda" and cfg.llm_conf.freeze and cfg.llm_conf.llm_dtype == "bf16"
    if half and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise model.UserError("this GPU has no bf16: set llm_conf.llm_dtype=fp32")
    parts = load_parts(
        OmegaConf.to_container(cfg), find_start(cfg), torch.bfloat16 if half else torch.float32,
        cfg.llm != "none", cfg.ctc_weight > 0, texts,
    )  # fmt: skip
    if parts.random_ctc and cfg.ctc_decoder_conf.freeze:
        raise model.UserError(
            "the checkpoint has no CTC branch (ModelScope's has), and a frozen random one would "
            "teach noise: set ctc_decoder_conf.freeze=false, or ctc_weight=0 to leave it out"
        )
    freeze_parts(parts.nano, cfg)
    return parts


def freeze_parts(nano, cfg):
    """Switch off what the configuration freezes, for good."""
    settings = {name: cfg[f"{name}_conf"] for name in ("audio_encoder", "audio_adaptor", "llm")}
    settings |= {"ctc_decoder": cfg.ctc_decoder_conf, "ctc": cfg.ctc_decoder_conf}
    for name, part in nano.named_children():
        if settings[name].freeze and not (name == "llm" and cfg.llm_conf.use_lora):
            model.freeze(part)
    blocks, lowest = nano.blocks(), cfg.audio_encoder_conf.freeze_layer_num
    if lowest >= len(blocks):
        key = f"audio_encoder_conf.freeze_layer_num={lowest}"
        raise model.UserError(f"{key}: the encoder has {len(blocks)} blocks")
    below = blocks[: max(0, lowest)]
    if below and isinstance(nano.audio_encoder, model.WhisperEncoder):
        below += [nano.audio_encoder.net.conv1, nano.audio_encoder.net.conv2]
    for part in below:
        model.freeze(part)
    for block in blocks if cfg.audio_encoder_conf.activation_checkpoint else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


# ---- data -------------------------------------------------------------------


def manifests(cfg):
    return Path(cfg.output_dir).parent / "manifests"


def list_files(specs):
    """Manifests, with FunASR's lists of .jsonl files written out."""
    for spec in model.as_list(specs):
        if Path(spec).suffix in (".list", ".txt") and Path(spec).is_file():
            yield from (line for _, line in model.read_lines(spec))
        else:
            yield spec


def ctc_text(text, cfg):
    return model.normalize_text(text) if cfg.dataset_conf.ctc_target_normalize else text.strip()


def read_clips(spec, kind, cfg, parts):
    """A manifest -> Dataset of its clips with lengths and labels; `reason`: why it is unreadable.

    Lengths come from the files' headers, once: the result is kept until a file changes.
    """
    import datasets

    rows, kinds = (
        model.read_manifest(spec, manifests(cfg)),
        ("string", "string", "float64", "int64"),
    )
    kinds = dict(
        zip(("kind", "reason", "seconds", "frames"), map(datasets.Value, kinds), strict=True)
    )
    kinds |= {name: datasets.List(datasets.Value("int32")) for name in ("ids", "classes")}
    kept = [c for c in ("key", "source", "audio", "target", "hotwords") if c in rows.column_names]
    llm, ctc = parts.tokenizer, parts.ctc_tokenizer

    def measure(row):
        text, reason, seconds = (row["target"] or "").strip(), "", 0.0
        try:
            seconds = model.audio_seconds(row.get("audio") or row["source"])
        except model.AudioError as error:
            reason = str(error)
        ids = (
            llm(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"] if llm and text else []
        )
        found = {"kind": kind, "reason": reason, "seconds": seconds, "ids": ids}
        found["frames"] = model.fbank_frames(round(seconds * 16000))  # of 10 ms
        return found | {"classes": ctc.encode(ctc_text(text, cfg)) if ctc else []}

    files = [Path(path) for path in rows["source"]] if "source" in kept else []
    stats = [path.stat() for path in files if path.is_file()]
    made_of = [[stat.st_size, stat.st_mtime_ns] for stat in stats] + [kind, parts.base_hash]
    made_of += [cfg.dataset_conf.ctc_target_normalize, ctc and ctc.symbols, llm is None]
    return rows.map(
        measure, features=datasets.Features({name: rows.features[name] for name in kept} | kinds),
        remove_columns=[name for name in rows.column_names if name not in kept],
        new_fingerprint=model.hash_text([rows._fingerprint, made_of]),
    )  # fmt: skip


@dataclass
class Data:
    train: object  # Dataset; the last n_clean rows are the rehearsal
    lengths: np.ndarray  # of train, in the unit of dataset_conf.batch_size
    n_clean: int
    valid: object
    limited: list  # clips that a limit leaves out
    unreadable: dict  # {key: clip that cannot be read}


def read_set(specs, kind, cfg, parts, data, training, say):
    """Lists of one kind -> usable clips (or None) and their lengths; counts and names the others."""
    import datasets

    found = [read_clips(spec, kind, cfg, parts) for spec in list_files(specs)]
    if not found:
        return None, np.zeros(0)
    clips, conf = datasets.concatenate_datasets(found), cfg.dataset_conf
    frames, seconds = np.asarray(clips["frames"]), np.asarray(clips["seconds"])
    labels = np.array(
        [len(a) or len(b) for a, b in zip(clips["ids"], clips["classes"], strict=True)]
    )
    lengths = batch_lengths(clips, frames, labels, cfg, parts)
    limits = {"shorter than 25 ms": frames < 1}
    if training:
        limits |= {
            f"longer than max_token_length={conf.max_token_length}":
                frames + labels > conf.max_token_length,
            f"longer than max_source_length={conf.max_source_length}":
                frames > conf.max_source_length,
            f"shorter than min_source_length={conf.min_source_length}":
                frames < conf.min_source_length,
            f"text longer than max_target_length={conf.max_target_length}":
                labels > conf.max_target_length,
            f"larger than batch_size={conf.batch_size}": lengths > batch_limits(cfg)[0],
            "no transcript": (labels == 0) & (kind != "simulated" or not cfg.distill_weight),
        }  # fmt: skip
    reasons = np.array(clips["reason"], dtype=object)
    unreadable = reasons != ""
    for reason, holds in limits.items():
        reasons[holds & (reasons == "")] = reason
    say(f"{kind} {'training' if training else 'validation'}: {sum(reasons == '')} clips, "
        f"{seconds[reasons == ''].sum() / 3600:.3f} h")  # fmt: skip
    for reason in dict.fromkeys(reasons[reasons != ""]):
        out = np.flatnonzero(reasons == reason)
        longest = int(out[seconds[out].argmax()])
        say(f"  left out, {reason}: {len(out)} clips, {seconds[out].sum() / 3600:.3f} h; the longest "
            f"is {clips[longest]['key']} ({seconds[longest]:.1f} s)")  # fmt: skip
    for n in np.flatnonzero(reasons != "").tolist():
        row = clips[n]
        row = {"key": row["key"], "source": row.get("source"), "reason": reasons[n]}
        if unreadable[n]:
            data.unreadable[row["key"]] = row
        else:
            data.limited.append(row)
    usable = np.flatnonzero(reasons == "")
    return clips.select(usable), lengths[usable]


def batch_lengths(clips, frames, labels, cfg, parts):
    """Lengths of clips in the unit of batch_type, LLM positions brought to the same measure."""
    conf = cfg.dataset_conf
    slowest = frames / min(conf.speed_perturb)
    lengths = slowest + labels if conf.batch_type == "token" else slowest
    if parts.tokenizer is None or conf.batch_type == "example":
        return lengths
    hotwords = clips["hotwords"] if "hotwords" in clips.column_names else [None] * len(clips)
    around = [sum(map(len, nano_prompt(parts.tokenizer, "", words or ""))) for words in hotwords]
    positions = llm_positions(-(-slowest // model.LFR_N)) + np.array(around) + labels
    return np.maximum(lengths, positions * conf.batch_size / conf.batch_size_token_max)


def batch_limits(cfg):
    """Most length and most clips of a batch."""
    conf = cfg.dataset_conf
    if conf.batch_type == "example":
        return math.inf, conf.batch_size
    return conf.batch_size, conf.batch_size_sample_max


def read_data(cfg, parts, say):
    """Training and validation clips; UserError where there is nothing to train on or to score."""
    import datasets

    data = Data(None, np.zeros(0), 0, None, [], {})
    rest = cfg, parts, data
    rehearsal = cfg.clean_data_set_list if cfg.data_mix else []
    lists = cfg.train_data_set_list, cfg.telephone_conf.data_set_list, rehearsal
    train = [
        read_set(specs, kind, *rest, True, say) for specs, kind in zip(lists, SETS, strict=True)
    ]
    clean = cfg.clean_valid_data_set_list
    lists = cfg.valid_data_set_list, clean, clean
    valid = [
        read_set(specs, kind, *rest, False, say) for specs, kind in zip(lists, SETS, strict=True)
    ]
    check_readable(data, cfg)
    counts = [len(lengths) for _, lengths in train]
    if not sum(counts[:2]):
        out = "; ".join(f"{n} {reason}" for reason, n in Counter(
            row["reason"] for row in [*data.limited, *data.unreadable.values()]).items())  # fmt: skip
        key = "train_data_set_list or telephone_conf.data_set_list"
        raise model.UserError(
            f"nothing to train on: give {key}" + (f" (left out: {out})" * bool(out))
        )
    if cfg.data_mix and not counts[2]:
        raise model.UserError("data_mix: needs clips in clean_data_set_list")
    if cfg.distill_weight and not sum(counts[1:]):
        raise model.UserError("distill_weight: needs clean speech in telephone_conf.data_set_list")
    if not sum(len(lengths) for _, lengths in valid):
        key = "valid_data_set_list or clean_valid_data_set_list"
        raise model.UserError(f"nothing to score on: give {key}")
    data.train = datasets.concatenate_datasets([clips for clips, _ in train if clips])
    data.valid = datasets.concatenate_datasets([clips for clips, _ in valid if clips])
    data.lengths, data.n_clean = np.concatenate([lengths for _, lengths in train]), counts[2]
    return data


def check_readable(data, cfg):
    """UserError if more clips than dataset_conf.retry could not be read."""
    count = len(data.unreadable)
    if count > cfg.dataset_conf.retry:
        last = list(data.unreadable.values())[-1]
        limit = f"more than dataset_conf.retry={cfg.dataset_conf.retry}"
        last = f"the last is {last['key']}: {last['source']} {last['reason']}"
        raise model.UserError(f"{count} clips cannot be read, {limit}; {last}")


def epoch_groups(data, cfg, world, epoch):
    """Groups of batches of one epoch, a function of seed and epoch: model.length_batches over all
    telephone clips, and over as many of the clean ones as make data_mix of the whole."""
    count = len(data.lengths) - data.n_clean
    wanted = round(cfg.data_mix / (1 - cfg.data_mix) * count)
    rng, chosen = np.random.default_rng([cfg.seed, epoch, 1]), [np.arange(count)]
    for _ in range(-(-wanted // data.n_clean) if data.n_clean else 0):  # too few: some come again
        chosen.append(count + rng.permutation(data.n_clean))
    chosen = np.concatenate(chosen)[: count + wanted]
    budget, most = batch_limits(cfg)
    lengths = data.lengths[chosen]
    groups = model.length_batches(lengths, budget, world, cfg.seed, epoch, most)
    return [[chosen[batch].tolist() for batch in group] for group in groups]


@dataclass
class Batch:
    feats: torch.Tensor  # (B, T, F) features, zeros where padded
    lens: torch.Tensor  # (B,) on the CPU
    twin: torch.Tensor | None  # (B, T, F) of the same speech, clean
    has_twin: torch.Tensor  # (B,) on the CPU
    twin_frames: int  # of the encoder's output, in rows that have a twin
    rows: dict  # lists of B: key, source, target, hotwords, kind, seconds, ids, classes, reason
    epoch: int
    used: int  # groups of the epoch that are then behind us

    def pin_memory(self):
        self.feats = self.feats.pin_memory()
        self.twin = self.twin if self.twin is None else self.twin.pin_memory()
        return self

    def to(self, device):
        self.feats = self.feats.to(device, non_blocking=True)
        self.twin = self.twin if self.twin is None else self.twin.to(device, non_blocking=True)
        return self

    def labels(self, cfg):
        """What the losses of this batch are divided by."""
        if cfg.model_conf.length_normalized_loss:
            ce, ctc = (sum(map(len, self.rows[name])) for name in ("ids", "classes"))
        else:
            ce, ctc = (sum(map(bool, self.rows[name])) for name in ("ids", "classes"))
        return {"ce": ce, "ctc": ctc, "distill": self.twin_frames}


class Clips(torch.utils.data.Dataset):
    """(epoch, number, group of model.length_batches) -> Batch of this process.

    Speed, line, dither and masks are functions of seed, epoch and clip. Epoch -1, of validation:
    nothing is random but the simulated line, which is the same every time.
    """

    def __init__(self, rows, frontend, cfg, rank=0):
        self.rows, self.frontend, self.cfg, self.rank = rows, frontend, cfg, rank
        self.wide, stacked = frontend, isinstance(frontend, NanoFrontend)
        if stacked:
            self.wide = NanoFrontend(**OmegaConf.to_container(cfg.frontend_conf) | {"fs": 16000})
        self.masking = make_masking(cfg, stacked)

    def __getitem__(self, place):
        epoch, number, group = place
        rows = self.rows[group[self.rank]]
        feats, twins, reasons = [], [], []
        for values in zip(*rows.values(), strict=True):
            clip, reason = dict(zip(rows, values, strict=True)), ""
            name = f"{self.cfg.seed}-{epoch}-{clip['key']}"
            try:
                heard, twin = self.load(clip, epoch, name)
            except model.AudioError as error:  # a second of silence without labels in its place
                heard, twin, reason = self.wide.features(torch.zeros(16000)), None, str(error)
            if self.masking is not None and epoch >= 0:
                seed = int(model.hash_text(f"{name} masks")[:15], 16)
                heard = self.masking(heard, torch.Generator().manual_seed(seed))
            feats.append(heard)
            twins.append(twin)
            reasons.append(reason)
        for name in ("ids", "classes"):
            kept = zip(rows[name], reasons, strict=True)
            rows[name] = [[] if reason else labels for labels, reason in kept]
        lens, has_twin = torch.tensor([len(x) for x in feats]), [x is not None for x in twins]
        twin = None
        if self.cfg.distill_weight and any(has_twin):
            pairs = zip(feats, twins, strict=True)
            twin = pad_sequence([x if y is None else y for x, y in pairs], batch_first=True)
        has_twin = torch.tensor(has_twin)
        return Batch(
            pad_sequence(feats, batch_first=True), lens, twin, has_twin,
            int((self.frontend.out_lens(lens) * has_twin).sum()), rows | {"reason": reasons},
            epoch, number + 1,
        )  # fmt: skip

    def load(self, clip, epoch, name):
        """Features of a clip as it is heard, and of the same speech, clean, or None."""
        cfg, rng, rate = self.cfg, random.Random(name), self.frontend.sample_rate
        on_phone, conf = clip["kind"] == "telephone", cfg.telephone_conf
        own_rate = rate if on_phone else 16000
        speed = rng.choice(list(cfg.dataset_conf.speed_perturb)) if epoch >= 0 else 1.0
        wave = model.load_audio(clip.get("audio") or clip["source"], own_rate)
        wave = model.change_speed(wave, speed, own_rate)
        if on_phone and (epoch < 0 or rng.random() >= conf.prob):
            return self.frontend.features(wave, name), None
        wave = wave[: len(wave) // 2 * 2]  # an even number: both rates then have the same frames
        clean = None if on_phone else self.wide.features(wave, name)
        if clip["kind"] == "clean":
            return clean, clean
        line = simulate_telephone(model.resample(wave, own_rate, 8000), conf, rng)
        line = model.resample(line, 8000, rate)[: len(wave) * rate // own_rate]
        heard = self.frontend.features(line, name)
        assert clean is None or len(heard) == len(clean), (
            f"{name}: {len(heard)}, {len(clean)} frames"
        )
        return heard, clean


def make_masking(cfg, stacked):
    """SpecAugLFR by the configuration, or None. stacked: features are LFR, else one frame each."""
    settings = OmegaConf.to_container(cfg.specaug_conf)
    for name in ("apply_time_warp", "time_warp_window"):
        settings.pop(name)
    if not stacked:
        settings["lfr_rate"] = 0
    return model.SpecAugLFR(**settings) if cfg.specaug else None


def load_batches(rows, places, parts, cfg, rank, device):
    return torch.utils.data.DataLoader(
        Clips(rows, parts.frontend, cfg, rank), batch_size=None, sampler=places,
        num_workers=cfg.dataset_conf.num_workers, pin_memory=device.type == "cuda",
    )  # fmt: skip


# ---- losses -----------------------------------------------------------------


class Finetune(nn.Module):
    """The model and its losses in one module, so that DDP wraps one forward pass."""

    def __init__(self, parts, cfg):
        super().__init__()
        self.nano, self.tokenizer, self.cfg, self.original = parts.nano, parts.tokenizer, cfg, None
        if cfg.distill_weight:
            self.original = model.freeze(copy.deepcopy(parts.nano.audio_encoder))
        weights = {"ce": cfg.llm_weight * (self.nano.llm is not None)}
        weights |= {"ctc": cfg.ctc_weight * (self.nano.ctc is not None)}
        weights |= {"distill": cfg.distill_weight}
        self.weights = {name: weight for name, weight in weights.items() if weight}

    def prompts(self, rows):
        words = [None] * len(rows["key"])
        if self.cfg.dataset_conf.prompt_conf.use_hotwords:
            words = rows.get("hotwords", words)
        return [nano_prompt(self.tokenizer, "", names or "") for names in words]

    def forward(self, batch):
        return self.losses(*self.nano.encode(batch.feats, batch.lens), batch)

    def losses(self, enc, lens, batch):
        """Sums over the batch: CE (nats), right tokens, CTC (nats), clips that CTC leaves out,
        squared distances (frames)."""
        nano, zero = self.nano, enc.sum() * 0.0
        sums = {"ce": zero, "right": 0, "ctc": zero, "impossible": 0, "distill": zero}
        if "ce" in self.weights:
            embed, prompts = nano.llm.get_input_embeddings(), self.prompts(batch.rows)
            spliced = model.splice(embed, prompts, *nano.listen(enc, lens), batch.rows["ids"])
            smoothing = self.cfg.model_conf.lsm_weight if self.training else 0.0
            sums["ce"], _, sums["right"] = model.transcript_loss(nano.llm, spliced, smoothing)
        if "ctc" in self.weights:
            heard = enc.detach() if self.cfg.detach_ctc_decoder else enc
            scores = nano.ctc_log_probs(heard, lens)
            classes = batch.rows["classes"]
            sums["ctc"], sums["impossible"] = model.ctc_loss(*scores, classes, nano.ctc.blank)
        if batch.twin is not None:
            with torch.no_grad():
                wanted, _ = self.original(batch.twin, batch.lens)
            keep = model.length_mask(lens * batch.has_twin, enc.shape[1], enc.device)
            distance = (enc - wanted.float()).pow(2).mean(-1)  # (B, T)
            sums["distill"] = distance.masked_fill(~keep, 0.0).sum()
        return sums


def check_losses(tuner, say):
    """UserError if a part trains that no loss reaches, or none does; else say what is reached."""
    nano, cfg = tuner.nano, tuner.cfg
    reach = {"ce": {"audio_encoder", "audio_adaptor", "llm"}, "distill": {"audio_encoder"}}
    reach["ctc"] = {"ctc_decoder", "ctc"}
    if not cfg.detach_ctc_decoder:
        reach["ctc"].add("audio_encoder")
    trains = set()
    for name, part in nano.named_children():
        count = sum(p.numel() for p in part.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in part.parameters()) - count
        say(f"{name}: {count:,} trainable, {frozen:,} frozen")
        trains |= {name} if count else set()
    if not trains:
        raise model.UserError("nothing trains: set audio_encoder_conf.freeze=false")
    if not tuner.weights:
        raise model.UserError("no loss is left: give llm_weight, ctc_weight or distill_weight")
    for name, weight in tuner.weights.items():
        say(
            f"{name} (weight {weight:g}) reaches {', '.join(sorted(reach[name] & trains)) or 'nothing'}"
        )
    for part in sorted(trains - set().union(*(reach[name] for name in tuner.weights))):
        why = "freeze it, or give its loss a weight"
        if part == "audio_encoder":
            why = "detach_ctc_decoder=true keeps CTC from it: set it to false, or llm_weight"
        raise model.UserError(f"no loss reaches {part}, which is trainable; {why}")


def make_optimizer(nano, conf):
    """AdamW; `scale` of a group is its share of the rate: lower blocks and CTC have their own."""
    blocks, groups = nano.blocks(), {}
    depth = {
        id(p): len(blocks) - 1 - n for n, block in enumerate(blocks) for p in block.parameters()
    }
    for name, parameter in nano.named_parameters():
        if not parameter.requires_grad:
            continue
        scale, decay = 1.0, conf.weight_decay if parameter.ndim > 1 else 0.0
        if name.startswith(CTC_PREFIXES):
            scale = (conf.ctc_lr or conf.lr) / conf.lr
        elif name.startswith(
            "audio_encoder."
        ):  # outside the blocks: norms above, convolutions below
            outside = 0 if "norm" in name else len(blocks)
            scale = conf.layer_decay ** depth.get(id(parameter), outside)
        groups.setdefault((scale, decay), []).append(parameter)
    groups = [{"params": p, "scale": s, "weight_decay": d} for (s, d), p in groups.items()]
    return torch.optim.AdamW(groups, lr=conf.lr, betas=tuple(conf.betas), fused=True)


def learning_rate(step, cfg):
    """FunASR's warmuplr: linear to the peak, then by 1 / sqrt(step), never 0."""
    n, warmup = step + 1, cfg.scheduler_conf.warmup_steps
    return cfg.optim_conf.lr * (min(n / warmup, math.sqrt(warmup / n)) if warmup else 1.0)


def train_step(wrapped, tuner, optimizer, batches, window, run):
    """One optimizer step; adds its sums to `window`. Output: the gradient's norm before clipping."""
    cfg = tuner.cfg
    counts = torch.tensor([list(batch.labels(cfg).values()) for batch in batches]).sum(0)
    counts = counts.float().to(run.device, non_blocking=True)
    if run.world > 1:
        dist.all_reduce(counts)  # labels of the step, of all processes
    totals = dict(zip(("ce", "ctc", "distill"), counts.clamp(min=1), strict=True))
    for batch in batches:
        waits = run.world > 1 and batch is not batches[-1]  # gradients are summed in the last one
        with wrapped.no_sync() if waits else contextlib.nullcontext():
            with run.amp:
                sums = wrapped(batch.to(run.device))
            loss = sum(weight * sums[n] / totals[n] for n, weight in tuner.weights.items())
            (loss * run.world).backward()  # DDP averages over processes; we want the sum
        window.update(
            {n: s.detach() if isinstance(s, torch.Tensor) else s for n, s in sums.items()}
        )
        window.update({f"n_{name}": count for name, count in batch.labels(cfg).items()})
        window.update(tokens=sum(map(len, batch.rows["ids"])), audio_s=sum(batch.rows["seconds"]))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, cfg.train_conf.grad_clip or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    window.update(steps=1, grad_norm=norm)
    return norm


def window_row(window, tuner, lr, seconds, n_dropped, device):
    """Averages since the last log, of process 0."""
    row = {n: float(window[n]) / window[f"n_{n}"] for n in tuner.weights if window[f"n_{n}"]}
    if "ce" in row:
        row["acc"] = float(window["right"]) / max(1, window["tokens"])
    row |= {"impossible": window["impossible"], "dropped": n_dropped, "lr": lr}
    row |= {"grad_norm": float(window["grad_norm"]) / window["steps"]}
    row |= {"audio_s_per_s": window["audio_s"] / seconds}
    if device.type == "cuda":
        row["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


# ---- validation -------------------------------------------------------------


def cut_batches(order, frames, cfg):
    """Clips in the order of their lengths -> batches of at most 16 clips and batch_size frames."""
    budget, batches = batch_limits(cfg)[0], []
    for n in order[::-1].tolist():
        first = batches[-1] if batches else None
        if first and len(first) < 16 and (len(first) + 1) * frames[first[0]] <= budget:
            first.append(n)
        else:
            batches.append([n])
    return batches


@torch.no_grad()
def evaluate(tuner, data, parts, run, decode=sys.maxsize):
    """Error rates and losses of each validation set; the processes share its clips.

    decode  so many clips of each set, of every length, are transcribed by the LLM too.
    Output  scores {telephone_llm_er: ...}, and {set: [(key, target, LLM's text, CTC's text)]}
    """
    tuner.eval()
    cfg, nano, rows = tuner.cfg, tuner.nano, data.valid
    kinds, frames, batches, chosen = np.asarray(rows["kind"]), np.asarray(rows["frames"]), [], set()
    for kind in SETS:
        order = np.flatnonzero(kinds == kind)
        order = order[np.argsort(frames[order], kind="stable")]
        spread = np.linspace(0, len(order) - 1, min(decode, len(order))).astype(int)
        chosen |= set(order[spread].tolist())
        batches += cut_batches(order, frames, cfg)
    mine = batches[run.rank :: run.world]
    loader = load_batches(rows, [(-1, 0, [batch]) for batch in mine], parts, cfg, 0, run.device)
    found, sums = {kind: [] for kind in SETS}, {kind: Counter() for kind in SETS}
    for numbers, batch in zip(mine, loader, strict=True):
        name_unreadable(batch, data)
        with run.amp:
            enc, lens = nano.encode(batch.to(run.device).feats, batch.lens)
            losses, heard = tuner.losses(enc, lens, batch), nano.hear(enc, lens)
            places = [place for place, n in enumerate(numbers) if n in chosen]
            said = read_llm(tuner, heard, places, batch.rows) if nano.llm is not None else {}
        kind = batch.rows["kind"][0]
        sums[kind].update({name: float(losses[name]) for name in tuner.weights})
        sums[kind].update({f"n_{name}": count for name, count in batch.labels(cfg).items()})
        for place, reason in enumerate(batch.rows["reason"]):
            text = parts.ctc_tokenizer.decode(heard.paths[place]) if heard.paths else None
            row = batch.rows["key"][place], batch.rows["target"][place], said.get(place), text
            found[kind] += [row] if not reason else []
    shared = [(found, sums)] * run.world
    if run.world > 1:
        dist.all_gather_object(shared, (found, sums))
    found = {kind: [row for part, _ in shared for row in part[kind]] for kind in SETS}
    sums = {kind: sum((part[kind] for _, part in shared), Counter()) for kind in SETS}
    tuner.train()
    return score(found, sums, tuner.weights, parts.ctc_tokenizer is not None), found


def score(found, sums, losses, has_ctc):
    """Texts and sums of each set -> {SET_llm_er, SET_ctc_er, SET_ce, SET_ctc, SET_distill}."""
    scores = {}
    for kind, rows in found.items():
        for name, column in (("llm_er", 2), ("ctc_er", 3)):
            pairs = [(row[1], row[column]) for row in rows if row[1] and row[column] is not None]
            if pairs:
                scores[f"{kind}_{name}"] = model.error_rate(*zip(*pairs, strict=True))["rate"]
        for name in losses:
            if count := sums[kind][f"n_{name}"]:
                scores[f"{kind}_{name}"] = sums[kind][name] / count
    return scores


def read_llm(tuner, heard, places, rows):
    """Greedy transcripts of the LLM: {place in the batch: text}."""
    if not places:
        return {}
    embed, prompts = tuner.nano.llm.get_input_embeddings(), tuner.prompts(rows)
    speech = heard.speech[places], heard.speech_lens[places]
    spliced = model.splice(embed, [prompts[n] for n in places], *speech, pad_left=True)
    stop = tuner.tokenizer.convert_tokens_to_ids("<|im_end|>")
    caps = [model.token_cap(rows["seconds"][n]) for n in places]
    answers = model.greedy_decode(tuner.nano.llm, spliced, stop, caps)
    texts = tuner.tokenizer.batch_decode(answers, skip_special_tokens=True)
    return {n: text.strip() for n, text in zip(places, texts, strict=True)}


def rank_of(scores, tuner):
    """What decides which checkpoint is better, less is: error rate of telephone speech, by the
    read-out that trains most; where rates are equal, the loss."""
    for kind in SETS:
        for loss, name in (("ce", "llm_er"), ("ctc", "ctc_er")):
            if loss in tuner.weights and f"{kind}_{name}" in scores:
                return [scores[f"{kind}_{name}"], scores.get(f"{kind}_{loss}", 0.0)]
        if f"{kind}_distill" in scores:
            return [scores[f"{kind}_distill"], 0.0]
    raise model.UserError("validation has nothing to score: no transcripts, no simulated speech")


def name_unreadable(batch, data):
    for key, source, reason in zip(
        batch.rows["key"], batch.rows.get("source", batch.rows["key"]), batch.rows["reason"],
        strict=True,
    ):  # fmt: skip
        if reason:
            data.unreadable[key] = {"key": key, "source": source, "reason": reason}


# ---- the run ----------------------------------------------------------------


def trained_state(parts):
    """What makes this model of its base: what trains, and what an earlier run has changed."""
    names = {n for n, p in parts.nano.named_parameters() if p.requires_grad} | parts.first.keys()
    state = parts.nano.state_dict()
    return {name: state[name].detach().cpu() for name in state if name in names}


def check_room(cfg, parts):
    """UserError if the checkpoints that the run will keep do not fit on the disk."""
    folder = Path(cfg.output_dir)
    near = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    if not os.access(near, os.W_OK):
        raise model.UserError(f"output_dir={folder}: {near} is not writable")
    one = sum(value.nbytes for value in trained_state(parts).values())
    needed = one * (cfg.train_conf.keep_nbest_models + 5)  # avg, trained; last: with two moments
    free = shutil.disk_usage(near).free + sum(path.stat().st_size for path in folder.glob("*.pt"))
    if needed > free:
        room = f"{free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB needed"
        raise model.UserError(f"{folder}: {room}; lower train_conf.keep_nbest_models")


def keep_best(folder, kept, step, rank, state):
    """Write this checkpoint if it is among the best `most`, remove the one that it pushes out."""
