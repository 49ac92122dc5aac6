"""Adapt Fun-ASR-Nano's encoder to 8 kHz telephone speech: one command, error rates before and after, back to FunASR.

    python finetune_encoder.py configs/stage1.yaml [key=value ...]          # FunASR's own keys; ++key=value works too
    torchrun --nproc_per_node 4 finetune_encoder.py configs/stage1.yaml
    python finetune_encoder.py configs/stage1.yaml --check                  # what would happen; exit 1 if a line fails
    python finetune_encoder.py configs/stage1.yaml --show clip.wav          # picture of channel and masks
    python finetune_encoder.py --compare configs/stage1.yaml configs/telephone_8k.yaml
    python finetune_encoder.py merge runs/stage1 Fun-ASR-Nano-2512/model.pt -o merged/

Loss    llm_weight x cross-entropy of the transcript through the LLM (label smoothing model_conf.lsm_weight)
        + ctc_weight x CTC (reaches the encoder unless detach_ctc_decoder)
        + distill_weight x mean squared distance to the frozen original encoder on the clean twin of simulated speech
        each summed over the step and divided by its labels (distillation: frames) of all processes
Data    train_data_set_list: telephone speech; telephone_conf.data_set_list: clean speech that is sent through a
        simulated line; clean_data_set_list: clean rehearsal, data_mix of an epoch. Manifests as everywhere here: our
        jsonl, FunASR's classic and chat jsonl, folders with wav.scp and text; several are separated by commas.
Input   the official folder (model.pt, multilingual.tiktoken, Qwen3-0.6B/), or `audio_encoder: openai/whisper-tiny.en`:
        any encoder of model.load_encoder, with a CTC head over characters or words of its own.
Output  output_dir/trained.pt (what changed; the better of the best checkpoint and the average), config.json (with the
        base's hash): what `merge` and infer.py need; step-*.pt and avg.pt; last.pt to resume; bad.jsonl; table.md,
        results.json, curves.png, worst.txt; metrics.jsonl and TensorBoard events
Units   dataset_conf lengths count 10 ms frames of audio plus text tokens, SpecAug's time masks feature frames, which
        are 60 ms here, and 10 ms with Whisper.
Papers  SpecAugment 1904.08779, CTC (Graves 2006), packet loss as a Gilbert chain (Gilbert 1960).
Source  key names and the meaning of keys: funasr 1.4.16, which parses many that it never uses; NO_EFFECT says which
        of them change nothing here either.
Logged  ce (nats per label), ctc (nats per CTC label), distill (squared distance per frame and dimension), acc, lr,
        grad_norm, audio_s_per_s, impossible (clips with more CTC labels than frames), bad; valid: SET_ctc_er,
        SET_llm_er (WER, or CER for Chinese), SET_distill; SET is telephone, simulated or clean.
"""

import copy
import difflib
import io
import json
import math
import os
import random
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torchaudio
import yaml
from rapidfuzz.distance import Levenshtein
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import model

DEFAULTS = {  # the release's values; the keys that FunASR does not have are marked +
    "base": "",  # + YAML that this one builds on, relative to its own folder
    "model": "FunASRNano",  # FunASRNano (then init_param says where it is), or hub name or folder of the whole model
    "init_param": "",  # model.pt or its folder; `scratch`: random weights (small encoders only)
    "init_run": "",  # + run folder of this script to start from, instead of the base's weights alone
    "model_conf.lsm_weight": 0.1,  # label smoothing of the cross-entropy
    "model_conf.length_normalized_loss": True,  # divide by label tokens (False: by clips)
    "audio_encoder": "SenseVoiceEncoderSmall",  # or any name that model.load_encoder takes
    "audio_encoder_conf.output_size": 512,
    "audio_encoder_conf.attention_heads": 4,
    "audio_encoder_conf.linear_units": 2048,
    "audio_encoder_conf.num_blocks": 50,
    "audio_encoder_conf.tp_blocks": 20,
    "audio_encoder_conf.freeze": True,
    "audio_encoder_conf.freeze_layer_num": -1,  # > 0: the lowest so many blocks stay frozen
    "audio_encoder_conf.activation_checkpoint": False,  # trade a third more computing for most of the memory
    "audio_encoder_conf.dropout_rate": 0.1,
    "audio_encoder_conf.positional_dropout_rate": 0.1,
    "audio_encoder_conf.attention_dropout_rate": 0.1,
    "audio_encoder_conf.input_layer": "pe",
    "audio_encoder_conf.pos_enc_class": "SinusoidalPositionEncoder",
    "audio_encoder_conf.normalize_before": True,
    "audio_encoder_conf.kernel_size": 11,
    "audio_encoder_conf.sanm_shfit": 0,
    "audio_encoder_conf.selfattention_layer_type": "sanm",
    "audio_encoder_conf.feat_permute": True,
    "llm": "Qwen3-0.6b",  # none: no LLM in memory, CTC and distillation only
    "llm_conf.hub": "hf",
    "llm_conf.freeze": True,
    "llm_conf.llm_dtype": "bf16",  # of a frozen LLM on a GPU; a CPU and a trained LLM take fp32
    "llm_conf.init_param_path": "Qwen3-0.6B",  # folder of its configuration, relative to that of model.pt
    "llm_conf.use_lora": False,
    "llm_conf.lora_conf.freeze_lora": True,
    "llm_conf.lora_conf.task_type": "CAUSAL_LM",
    "llm_conf.lora_conf.r": 16,
    "llm_conf.lora_conf.lora_alpha": 32,
    "llm_conf.lora_conf.lora_dropout": 0.05,
    "llm_conf.lora_conf.bias": "none",
    "llm_conf.lora_conf.target_modules": ["q_proj", "v_proj"],
    "llm_conf.lora_conf.init_param_path": "",
    "llm_weight": 1.0,  # +
    "audio_adaptor": "Transformer",
    "audio_adaptor_conf.downsample_rate": 1,
    "audio_adaptor_conf.use_low_frame_rate": True,
    "audio_adaptor_conf.ffn_dim": 2048,
    "audio_adaptor_conf.llm_dim": 1024,
    "audio_adaptor_conf.encoder_dim": 512,
    "audio_adaptor_conf.n_layer": 2,
    "audio_adaptor_conf.freeze": True,
    "ctc_decoder": "Transformer",  # none: the CTC head sits on the encoder itself
    "ctc_decoder_conf.downsample_rate": 1,
    "ctc_decoder_conf.ffn_dim": 2048,
    "ctc_decoder_conf.llm_dim": 512,
    "ctc_decoder_conf.encoder_dim": 512,
    "ctc_decoder_conf.n_layer": 5,
    "ctc_decoder_conf.freeze": False,  # decoder and head
    "ctc_vocab_size": 60515,  # of FunASR's tokenizer, blank included
    "detach_ctc_decoder": True,  # True: CTC trains its own branch and never reaches the encoder
    "ctc_weight": 1.0,
    "ctc_conf.dropout_rate": 0.0,
    "ctc_conf.ctc_type": "builtin",
    "ctc_conf.reduce": True,
    "ctc_conf.ignore_nan_grad": True,
    "distill_weight": 0.0,  # +
    "frontend": "WavFrontend",
    "frontend_conf.fs": 16000,  # 8000: native telephone speech, no resampling
    "frontend_conf.mel_axis": "pretrained",  # + at 8000: pretrained, or native (FunASR's warped one)
    "frontend_conf.dither": 1.0,  # FunASR's default, at inference too
    "frontend_conf.window": "hamming",
    "frontend_conf.n_mels": 80,
    "frontend_conf.frame_length": 25,
    "frontend_conf.frame_shift": 10,
    "frontend_conf.lfr_m": 7,
    "frontend_conf.lfr_n": 6,
    "frontend_conf.cmvn_file": "",
    "specaug": "",  # SpecAugLFR, or empty
    "specaug_conf.apply_time_warp": False,
    "specaug_conf.time_warp_window": 5,
    "specaug_conf.apply_freq_mask": True,
    "specaug_conf.freq_mask_width_range": [0, 20],
    "specaug_conf.lfr_rate": 6,
    "specaug_conf.num_freq_mask": 2,
    "specaug_conf.apply_time_mask": True,
    "specaug_conf.time_mask_width_range": [0, 10],
    "specaug_conf.num_time_mask": 2,
    "specaug_conf.time_mask_max_ratio": 0.1,  # + no time mask is longer than this share of its clip
    "telephone_conf.data_set_list": "",  # + clean speech that always goes through the simulated line
    "telephone_conf.prob": 0.0,  # + share of train_data_set_list's clips that go through it too
    "telephone_conf.band_prob": 1.0,  # + 300-3400 Hz
    "telephone_conf.noise_prob": 0.5,  # + white noise
    "telephone_conf.snr_db": [5.0, 30.0],  # +
    "telephone_conf.level_prob": 1.0,  # +
    "telephone_conf.level_db": [-30.0, 0.0],  # + peak, dBFS
    "telephone_conf.codec_prob": 1.0,  # +
    "telephone_conf.codecs": ["mulaw", "alaw", "gsm"],  # + one of them is drawn
    "telephone_conf.packet_loss_prob": 0.5,  # + share of the clips that lose packets
    "telephone_conf.packet_loss_rate": [0.01, 0.05],  # + share of their 20 ms packets
    "telephone_conf.packet_loss_burst": 2.0,  # + mean number of packets lost in a row
    "data_mix": 0.0,  # + share of an epoch that is clean rehearsal
    "train_conf.use_lora": False,
    "train_conf.accum_grad": 1,
    "train_conf.grad_clip": 5.0,
    "train_conf.max_epoch": 2,
    "train_conf.max_steps": 0,  # + > 0: stop after so many optimizer steps
    "train_conf.keep_nbest_models": 200,
    "train_conf.log_interval": 100,
    "train_conf.validate_interval": 2000,  # steps; also at the end of every epoch
    "train_conf.save_checkpoint_interval": 2000,
    "train_conf.avg_nbest_model": 100,
    "train_conf.early_stopping_patience": 0,  # > 0: stop after so many validations without a better score
    "train_conf.valid_decode": 64,  # + clips of each set that the LLM transcribes at a validation; all at the end
    "train_conf.use_bf16": False,
    "train_conf.use_fp16": False,
    "train_conf.use_deepspeed": True,
    "train_conf.deepspeed_config": "",
    "train_conf.save_init_model": False,
    "train_conf.effective_save_name_excludes": ["llm."],
    "train_conf.resume": True,
    "optim": "adamw",
    "optim_conf.lr": 5.0e-6,
    "optim_conf.ctc_lr": 0.0,  # + of CTC decoder and head; 0: as lr
    "optim_conf.layer_decay": 1.0,  # + learning rate of each encoder block over that of the one above it
    "optim_conf.weight_decay": 0.0,  # not on norms and biases
    "optim_conf.betas": [0.9, 0.999],
    "scheduler": "warmuplr",
    "scheduler_conf.warmup_steps": 2500,
    "dataset": "FunASR",
    "dataset_conf.index_ds": "FunASR",
    "dataset_conf.batch_sampler": "BatchSampler",
    "dataset_conf.batch_type": "token",  # token (frames + text), length (frames) or example
    "dataset_conf.batch_size": 6000,  # of that unit, padding included, per process and micro-batch
    "dataset_conf.max_token_length": 3500,
    "dataset_conf.shuffle": True,
    "dataset_conf.sort_size": 1024,
    "dataset_conf.batch_size_scale_ratio_max": 2.0,
    "dataset_conf.num_workers": 4,
    "dataset_conf.audio_adaptor_downsample_rate": "${audio_adaptor_conf.downsample_rate}",
    "dataset_conf.audio_encoder_downsample_rate": 6,
    "dataset_conf.data_split_num": 256,
    "dataset_conf.batch_size_sample_max": 10,
    "dataset_conf.retry": 2000,  # stop when more clips than this cannot be used
    "dataset_conf.batch_size_token_max": 6000,  # LLM positions of a batch, padding included
    "dataset_conf.max_source_length": 12000,
    "dataset_conf.max_target_length": 2048,
    "dataset_conf.min_source_length": 10,
    "dataset_conf.batch_size_scale_threshold": 3000,
    "dataset_conf.speed_perturb": [1.0],  # + factors to draw from, for training clips
    "dataset_conf.prompt_classes": "MultiContextPrompt",
    "dataset_conf.prompt_conf.max_neg_hotwords_num": 0,
    "dataset_conf.prompt_conf.min_neg_hotwords_num": 0,
    "dataset_conf.prompt_conf.use_hist": False,
    "dataset_conf.prompt_conf.use_one_pass_result": True,
    "dataset_conf.prompt_conf.use_hotwords": True,
    "dataset_conf.prompt_conf.use_asr_hotwords": True,
    "dataset_conf.prompt_conf.chinese_hotwords_list": "",
    "dataset_conf.prompt_conf.english_hotwords_list": "",
    "dataset_conf.ctc_tokenizer": "SenseVoiceTokenizer",  # + or char, word: symbols of the training transcripts
    "dataset_conf.ctc_target_normalize": True,  # lower case, no punctuation
    "dataset_conf.ctc_tokenizer_conf.vocab_path": "",  # empty: multilingual.tiktoken beside model.pt
    "dataset_conf.ctc_tokenizer_conf.is_multilingual": True,
    "dataset_conf.ctc_tokenizer_conf.num_languages": 8749,
    "dataset_conf.use_dynamic_output_ratio": 0.0,
    "tokenizer": "HuggingfaceTokenizer",
    "tokenizer_conf.init_param_path": "${llm_conf.init_param_path}",
    "tokenizer_conf.unk_symbol": "<unk>",
    "enable_tf32": True,
    "debug": False,
    "train_data_set_list": "",
    "valid_data_set_list": "",
    "clean_data_set_list": "",  # + clean rehearsal
    "clean_valid_data_set_list": "",  # + scored as it is, and through the simulated line
    "output_dir": "",
    "seed": 0,
    "device": "auto",
}

ONLY = {  # keys of which one value is implemented; any other stops the run
    "audio_adaptor": "Transformer", "frontend": "WavFrontend", "frontend_conf.window": "hamming",
    "frontend_conf.n_mels": 80, "frontend_conf.frame_length": 25, "frontend_conf.frame_shift": 10,
    "frontend_conf.lfr_m": 7, "frontend_conf.lfr_n": 6, "optim": "adamw", "scheduler": "warmuplr", "dataset": "FunASR",
    "dataset_conf.index_ds": "FunASR", "audio_encoder_conf.input_layer": "pe", "audio_encoder_conf.sanm_shfit": 0,
    "audio_encoder_conf.pos_enc_class": "SinusoidalPositionEncoder", "audio_encoder_conf.normalize_before": True,
    "audio_encoder_conf.selfattention_layer_type": "sanm", "ctc_conf.ctc_type": "builtin",
    "tokenizer": "HuggingfaceTokenizer", "llm_conf.lora_conf.bias": "none", "llm_conf.lora_conf.init_param_path": "",
}  # fmt: skip

NO_EFFECT = {  # keys that are accepted and change nothing, and why
    "audio_encoder_conf.positional_dropout_rate": "the released encoder has no dropout on its positions",
    "audio_encoder_conf.feat_permute": "features are always (batch, time, bins)",
    "audio_adaptor_conf.encoder_dim": "the encoder's output_size decides",
    "ctc_decoder_conf.encoder_dim": "the encoder's output_size decides",
    "llm_conf.hub": "the LLM's files lie in the model's own folder",
    "llm_conf.lora_conf.freeze_lora": "LoRA trains whenever llm_conf.use_lora is true",
    "llm_conf.lora_conf.task_type": "the LLM is a causal one",
    "llm_conf.lora_conf.lora_dropout": "the whole LLM stays in eval mode, its LoRA too",
    "train_conf.use_lora": "llm_conf.use_lora decides",
    "ctc_conf.reduce": "the loss is summed and divided by the labels of the whole step",
    "ctc_conf.ignore_nan_grad": "clips with more labels than frames are left out and counted; a NaN stops the run",
    "train_conf.deepspeed_config": "DeepSpeed is not used; several GPUs: torchrun, too little memory: use_bf16 and "
                                   "audio_encoder_conf.activation_checkpoint",
    "train_conf.save_init_model": "the base stays where it is; every run names it with its hash",
    "train_conf.effective_save_name_excludes": "what changed is saved and nothing else; `merge` writes the whole model",
    "dataset_conf.batch_sampler": "FunASR maps every name to one sampler; here batches are cut by batch_type, shuffled",
    "dataset_conf.batch_size_scale_ratio_max": "FunASR reads it nowhere",
    "dataset_conf.batch_size_scale_threshold": "FunASR reads it nowhere",
    "dataset_conf.audio_adaptor_downsample_rate": "FunASR reads it nowhere; audio_adaptor_conf.downsample_rate decides",
    "dataset_conf.audio_encoder_downsample_rate": "FunASR reads it nowhere; the model has 60 ms a frame",
    "dataset_conf.data_split_num": "one epoch is one pass; FunASR makes as many passes over a single jsonl",
    "dataset_conf.use_dynamic_output_ratio": "FunASR reads it and does nothing with it",
    "dataset_conf.prompt_classes": "training uses the prompt of inference; FunASR's training header differs from it",
    "dataset_conf.prompt_conf.max_neg_hotwords_num": "no hotwords are made up; rows bring their own",
    "dataset_conf.prompt_conf.min_neg_hotwords_num": "no hotwords are made up; rows bring their own",
    "dataset_conf.prompt_conf.use_hist": "the prompt of inference has no history",
    "dataset_conf.prompt_conf.use_one_pass_result": "the prompt of inference has no first-pass result",
    "dataset_conf.prompt_conf.chinese_hotwords_list": "no hotwords are made up; rows bring their own",
    "dataset_conf.prompt_conf.english_hotwords_list": "no hotwords are made up; rows bring their own",
    "dataset_conf.ctc_tokenizer_conf.is_multilingual": "the release's tokenizer is the multilingual one",
    "dataset_conf.ctc_tokenizer_conf.num_languages": "special tokens are never targets",
    "tokenizer_conf.init_param_path": "the tokenizer lies beside the LLM's configuration",
    "tokenizer_conf.unk_symbol": "a byte-level tokenizer has no unknown symbol; FunASR ignores the key",
    "debug": "there is no debug mode",
}  # fmt: skip

CRITICAL = [  # rows that stand first in --compare
    "model", "init_param", "audio_encoder_conf.freeze", "llm_conf.freeze", "audio_adaptor_conf.freeze",
    "ctc_decoder_conf.freeze", "detach_ctc_decoder", "ctc_weight", "llm_weight", "distill_weight", "frontend_conf.fs",
    "frontend_conf.mel_axis", "specaug", "specaug_conf.time_mask_width_range", "specaug_conf.time_mask_max_ratio",
    "optim_conf.lr", "optim_conf.weight_decay", "scheduler_conf.warmup_steps", "train_conf.max_epoch",
    "train_conf.use_deepspeed", "dataset_conf.max_token_length", "dataset_conf.data_split_num",
]  # fmt: skip

CODECS = {"mulaw": "ULAW", "alaw": "ALAW", "gsm": "GSM610"}  # libsndfile's names


# ---- configuration (the same lines in every script; tests/test_copies.py) ---------------------------------------


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that refuses a key given twice; PyYAML itself silently keeps the last."""

    def construct_mapping(self, node, deep=False):
        seen = []
        for key_node, _ in node.value:
            key, mark = self.construct_object(key_node, deep=True), key_node.start_mark
            if key in seen:
                raise ValueError(f"{mark.name}:{mark.line + 1}: key {key!r} is given twice")
            seen.append(key)
        return super().construct_mapping(node, deep)


def load_config(arguments, defaults):
    """[config.yaml] key=value ... -> flat dict with every key of `defaults`; ValueError names file and nearest key."""
    given = []  # (where, key, value), later ones win
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals:
            # text stays as typed, required keys are text too: YAML minds colons and reads 007 as 7
            text = isinstance(defaults.get(key.strip()), str | type(...)) or not value
            given.append((f"argument {argument}", key.strip(), value if text else yaml.safe_load(value)))
            continue
        if not Path(argument).is_file():
            raise ValueError(f"{argument}: no such config file")
        with open(argument, encoding="utf-8") as file:
            tree = yaml.load(file, UniqueKeyLoader) or {}
        if not isinstance(tree, dict):
            raise ValueError(f"{argument}: expected `section:` or `key: value` lines")
        stack = [("", tree)]
        while stack:  # sections flatten into dotted keys
            prefix, section = stack.pop()
            for name, value in section.items():
                dotted = f"{prefix}{name}"
                if isinstance(value, dict):
                    stack.append((f"{dotted}.", value))
                elif any((where, key) == (argument, dotted) for where, key, _ in given):
                    raise ValueError(f"{argument}: key {dotted!r} is given twice")  # in a section, and spelt with dots
                else:
                    given.append((argument, dotted, value))
    config = dict(defaults)
    for where, key, value in given:
        if key not in defaults:
            nearest = difflib.get_close_matches(key, defaults, 1, 0.0)[0]
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {nearest!r}? (--help lists all)")
        config[key] = convert(value, defaults[key], f"{where}: {key}")
    missing = [key for key, value in config.items() if value is ...]
    if missing:
        raise ValueError(f"required key not given: {', '.join(missing)}")
    return config


def convert(value, default, where):
    """Bring a YAML value to the type of its default: PyYAML reads 1e-4 as a string and `no` as False."""
    if value is None and (default is None or default == ""):
        return default
    if value is None:
        raise ValueError(f"{where}: has no value")
    if isinstance(default, list):
        items = value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]
        return [convert(item, default[0], where) for item in items] if default else items
    kind = str if default is ... or default is None else type(default)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    try:
        if kind is bool or isinstance(value, (bool, list, dict)) or kind is int and float(value) % 1:
            raise ValueError
        return kind(value)
    except ValueError:
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r} ({type(value).__name__})") from None


def run_main(main, defaults, doc):
    """Command line of a script: --help, one-line errors for what the user can mend, exit status 2."""
    if any(argument in ("-h", "--help") for argument in sys.argv[1:]):
        width = max(len(key) for key in defaults)
        lines = (f"  {key:{width}}  {'(required)' if value is ... else value!r}" for key, value in defaults.items())
        print(doc.strip(), "\n\nKeys and defaults:", *lines, sep="\n")
        return
    try:
        main(load_config(sys.argv[1:], defaults))
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def pick_device(cfg):
    """Device, dtype of the frozen weights; sets TF32 for the whole process; under torchrun joins the process group."""
    kind = cfg["device"]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {kind!r}")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU here; use device=cpu, or check the driver with nvidia-smi")
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if kind.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))  # one rank may have all the work left
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(kind)
    names = {"fp32": torch.float32, "bf16": torch.bfloat16}
    names["auto"] = torch.bfloat16 if kind.startswith("cuda") else torch.float32
    if cfg["dtype"] not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {cfg['dtype']!r}")
    model.allow_tf32(names[cfg["dtype"]] == torch.bfloat16)  # for what is fp32 beside bf16: CTC, InfoNCE's cosines
    return torch.device(kind), names[cfg["dtype"]]


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def write_atomic(path, write):
    """Call `write(file)` on a temporary file, fsync, then rename: a kill or a full disk leaves the old file whole.

    No reader looks at a temporary file. What kill -9 leaves of one goes when the same file is next written, which the
    same command does.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for left_over in path.parent.glob(f".{path.name}.*.tmp"):
            left_over.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch.save makes a RuntimeError of a disk that fills up
            reason = getattr(error, "strerror", None) or f"{error}; is the disk full?"
            raise OSError(f"{path}: could not be written ({reason}); what was there before is whole") from error
        raise


def autocast(device, dtype):
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32)


# ---- FunASR's way of writing a configuration --------------------------------------------------------------------


def expand_arguments(arguments, above=()):
    """Put each YAML's `base` before it and take Hydra's ++key=value; the rest is load_config's.

    above: the files that build on these.
    """
    expanded = []
    for argument in arguments:
        argument = argument.removeprefix("++")
        if "=" not in argument and Path(argument).is_file():
            tree = yaml.load(Path(argument).read_text(encoding="utf-8"), yaml.SafeLoader)
            base = tree.get("base") if isinstance(tree, dict) else None
            if base:
                path = str(Path(argument).parent / base)
                if not Path(path).is_file():
                    raise ValueError(f"{argument}: base: {base}: no such file beside it")
                if path in (argument, *above):
                    raise ValueError(f"{argument}: base: {base}: builds on itself")
                bases = expand_arguments([path], (argument, *above))
                expanded += [name for name in bases if name not in expanded]  # two files may share a base
        expanded.append(argument)
    return expanded


def finish_config(cfg):
    """Resolve ${references}; refuse values that are not implemented and combinations that cannot work."""
    cfg = dict(cfg)
    for key, value in cfg.items():
        if isinstance(value, str) and value.startswith("${"):
            if value[2:-1] not in cfg:
                raise ValueError(f"{key}: {value} names no key")
            cfg[key] = cfg[value[2:-1]]
    for key, value in ONLY.items():
        if cfg[key] != value:
            raise ValueError(f"{key}: only {value!r} is implemented, got {cfg[key]!r}")
    choices = {"dataset_conf.batch_type": ("token", "length", "example"), "specaug": ("", "SpecAugLFR"),
               "dataset_conf.ctc_tokenizer": ("SenseVoiceTokenizer", "char", "word"),
               "ctc_decoder": ("Transformer", "none"), "llm_conf.llm_dtype": ("bf16", "fp16", "fp32")}
    for key, allowed in choices.items():
        if cfg[key] not in allowed:
            raise ValueError(f"{key}: expected one of {', '.join(allowed)}, got {cfg[key]!r}")
    if unknown := set(cfg["telephone_conf.codecs"]) - set(CODECS):
        raise ValueError(f"telephone_conf.codecs: no codec {', '.join(unknown)}; there are {', '.join(CODECS)}")
    if cfg["train_conf.use_deepspeed"]:
        raise ValueError("train_conf.use_deepspeed: DeepSpeed is not used here; set it to false. Several GPUs: "
                         "torchrun --nproc_per_node N. Too little memory: train_conf.use_bf16=true, "
                         "audio_encoder_conf.activation_checkpoint=true, a smaller dataset_conf.batch_size")
    if cfg["train_conf.use_bf16"] and cfg["train_conf.use_fp16"]:
        raise ValueError("train_conf.use_bf16 and use_fp16 exclude each other")
    at_least_one = ("train_conf.log_interval", "train_conf.validate_interval", "train_conf.save_checkpoint_interval",
                    "train_conf.accum_grad", "train_conf.max_epoch", "dataset_conf.batch_size",
                    "dataset_conf.batch_size_sample_max", "dataset_conf.batch_size_token_max",
                    "telephone_conf.packet_loss_burst")
    for key in at_least_one:
        if cfg[key] < 1:
            raise ValueError(f"{key}: has to be at least 1, got {cfg[key]}")
    for key in ("snr_db", "level_db", "packet_loss_rate"):
        value = cfg[f"telephone_conf.{key}"]
        if len(value) != 2 or value[0] > value[1] or key == "packet_loss_rate" and not 0 <= value[0] <= value[1] < 1:
            raise ValueError(f"telephone_conf.{key}: expected [lowest, highest]"
                             + (" from 0 up to, not including, 1" if key == "packet_loss_rate" else "")
                             + f", got {value}")
    if cfg["llm"].lower() not in ("qwen3-0.6b", "none"):
        raise ValueError(f"llm: expected Qwen3-0.6b (that of the model's own folder) or none, got {cfg['llm']!r}")
    if not 0 <= cfg["data_mix"] < 1:
        raise ValueError(f"data_mix is a share from 0 up to, not including, 1; got {cfg['data_mix']}")
    return cfg


def nested(cfg):
    """Flat keys -> FunASR's sections, as model.build_nano and config.yaml have them."""
    tree = {}
    for key, value in cfg.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    tree["ctc_decoder"] = None if cfg["ctc_decoder"] == "none" else cfg["ctc_decoder"]
    tree["frontend_conf"] = {k: v for k, v in tree["frontend_conf"].items() if v != ""}
    return tree


def written_keys(path):
    """What one YAML itself says, without its base: {dotted key: value}."""
    flat, stack = {}, [("", yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeyLoader) or {})]
    while stack:
        prefix, section = stack.pop()
        for name, value in section.items():
            if isinstance(value, dict):
                stack.append((f"{prefix}{name}.", value))
            else:
                flat[prefix + name] = value
    return flat


def compare(paths):
    """Markdown table of every key in the given YAMLs against their common base (or the first of them)."""
    written = {path: written_keys(path) for path in paths}
    bases = {str(Path(path).parent / keys["base"]) for path, keys in written.items() if keys.get("base")}
    if len(bases) > 1:
        raise ValueError(f"--compare: the files build on different bases: {', '.join(sorted(bases))}")
    base = bases.pop() if bases else paths[0]
    release, others = written_keys(base), [path for path in paths if Path(path) != Path(base)]

    def value_of(key, value):
        return convert(value, DEFAULTS[key], key) if value is not None else "null"

    def cell(key, keys):
        if key not in keys:
            return "left out"
        value = value_of(key, keys[key])
        if key not in release:
            return f"new `{shown(value)}`"
        return "same" if value == value_of(key, release[key]) else f"**`{shown(value)}`**"

    def shown(value):
        return "null" if value in ("null", "") else json.dumps(value) if not isinstance(value, str) else value

    for path in paths:  # an unknown key is an error here as well
        load_config(expand_arguments([path]), DEFAULTS)
    known = [key for key in DEFAULTS if key != "base" and any(key in keys for keys in (release, *written.values()))]
    known.sort(key=lambda key: CRITICAL.index(key) if key in CRITICAL else len(CRITICAL))  # stable: then as in DEFAULTS
    names = [Path(path).stem for path in others]
    lines = [f"| key | {Path(base).stem} | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
    for key in known:
        first = f"`{shown(value_of(key, release[key]))}`" if key in release else "n/a"
        row = " | ".join(cell(key, written[path]) for path in others)
        lines.append(f"| {'**' * (key in CRITICAL)}`{key}`{'**' * (key in CRITICAL)} | {first} | {row} |")
    return "\n".join(lines)


# ---- signal -----------------------------------------------------------------------------------------------------


def simulate_telephone(wave, cfg, rng):
    """Clean speech at 8 kHz -> the same through a telephone line: noise, band, level, codec, lost packets.

    Each effect comes with its own probability (telephone_conf); `rng` (random.Random) decides everything.
    wave (N,) -> (N,), no delay, so that frames of both lie on each other (the filters' few samples aside).
    """
    def draws(effect):
        return rng.random() < cfg[f"telephone_conf.{effect}_prob"]

    def noise():
        return torch.from_numpy(np.random.default_rng(rng.getrandbits(63)).standard_normal(len(wave))).float()

    if draws("noise"):  # before the band: it is the room's, not the line's
        wave = wave + wave.std() * 10 ** (-rng.uniform(*cfg["telephone_conf.snr_db"]) / 20) * noise()
    if draws("band"):
        wave = torchaudio.functional.highpass_biquad(wave, 8000, 300.0)
        wave = torchaudio.functional.lowpass_biquad(wave, 8000, 3400.0)
    if draws("level"):
        wave = wave / wave.abs().max().clamp(min=1e-5) * 10 ** (rng.uniform(*cfg["telephone_conf.level_db"]) / 20)
    if draws("codec"):
        wave = through_codec(wave, rng.choice(cfg["telephone_conf.codecs"]))
    if draws("packet_loss"):
        wave = lose_packets(wave, rng.uniform(*cfg["telephone_conf.packet_loss_rate"]),
                            cfg["telephone_conf.packet_loss_burst"], rng)
    return wave


def through_codec(wave, codec):
    """Encode and decode 8 kHz speech with libsndfile: G.711 mu-law or A-law, or GSM 06.10."""
    file = io.BytesIO()
    soundfile.write(file, wave.clamp(-1, 1).numpy(), 8000, format="WAV", subtype=CODECS[codec])
    file.seek(0)
    decoded = torch.from_numpy(soundfile.read(file, dtype="float32")[0])
    return nn.functional.pad(decoded, (0, max(0, len(wave) - len(decoded))))[: len(wave)]  # GSM has blocks of 20 ms


def lose_packets(wave, rate, burst, rng):
    """Silence 20 ms packets by a two-state (Gilbert) chain: `rate` of them, `burst` in a row on average."""
    lost, wave = rng.random() < rate, wave.clone()
    for first in range(0, len(wave), 160):
        if lost:
            wave[first : first + 160] = 0.0
        lost = rng.random() < (1 - 1 / burst if lost else rate / (1 - rate) / burst)
    return wave


def is_stacked(frontend):
    """True if a feature frame is 7 mel frames beside each other (LFR)."""
    return isinstance(frontend, model.NanoFrontend | model.KaldiEncoder)


def make_masking(cfg, stacked):
    """SpecAugLFR by the configuration, or None. stacked: features are LFR (else one group of bins)."""
    if not cfg["specaug"]:
        return None
    names = ("apply_time_warp", "time_warp_window", "apply_freq_mask", "freq_mask_width_range", "num_freq_mask",
             "apply_time_mask", "time_mask_width_range", "num_time_mask", "time_mask_max_ratio")
    return model.SpecAugLFR(**{name: cfg[f"specaug_conf.{name}"] for name in names},
                            lfr_rate=cfg["specaug_conf.lfr_rate"] if stacked else 0)


# ---- data: what is learned and heard, and in which order --------------------------------------------------------


def read_list(specs, kind, cfg, tools, drops, training=True):
    """Manifests -> utterances with their lengths; `drops` {reason: [(seconds, key)]} counts what is left out.

    kind    telephone (as it is), simulated (clean speech, sent through the simulated line) or clean (rehearsal).
    tools   frontend, LLM tokenizer or None, CTC tokenizer or None (not made yet).
    """
    utterances = []
    for spec in (part.strip() for part in specs.split(",") if part.strip()):
        if Path(spec).suffix in (".list", ".txt") and Path(spec).is_file():  # FunASR's list of jsonl files
            lists = [line.strip() for line in model.read_lines(Path(spec)) if line.strip()]
        else:
            lists = [spec]
        for row in (row for path in lists for row in model.read_manifest(path)):
            try:
                info = soundfile.info(row["source"])
            except (RuntimeError, OSError, TypeError) as error:  # TypeError: headerless .raw
                drops.setdefault("unreadable", []).append((0.0, row["key"], row["source"], str(error)))
                continue
            seconds = info.duration
            if kind == "telephone" and tools["frontend"].sample_rate == 8000 and info.samplerate != 8000:
                raise ValueError(f"{row['where']}: {row['source']} has {info.samplerate} Hz, but frontend_conf.fs=8000 "
                                 "takes native 8 kHz files: set frontend_conf.fs=16000 (any rate), or name clean "
                                 "speech in telephone_conf.data_set_list or clean_data_set_list")
            check_length(row, seconds)
            text = row["target"].strip()
            heard = model.normalize_text(text) if cfg["dataset_conf.ctc_target_normalize"] else text
            ids = tools["tokenizer"](f"{text}<|im_end|>", add_special_tokens=False)["input_ids"] if (
                tools["tokenizer"] and text) else []
            frames = model.fbank_frames(round(seconds * 16000))  # of 10 ms
            labels = len(ids) or len(heard)
            utterance = {"key": row["key"], "source": row["source"], "target": text, "heard": heard, "kind": kind,
                         "ids": ids, "frames": frames, "length": frames + labels, "seconds": seconds,
                         "hotwords": hotwords_of(row, cfg)}
            if reason := (reason_to_drop(utterance, labels, cfg) if training else frames < 1 and "shorter than 25 ms"):
                drops.setdefault(reason, []).append((seconds, row["key"], row["source"], reason))
            else:
                utterances.append(utterance)
    return utterances


def check_length(row, seconds):
    """FunASR's lengths count 10 ms frames; a file in another unit makes batches that are 6 or 100 times off."""
    claimed = row.get("speech_length", row.get("source_len"))
    frames = model.fbank_frames(round(seconds * 16000))
    if claimed is None:
        return
    if isinstance(claimed, bool) or not isinstance(claimed, int | float):
        raise ValueError(f"{row['where']}: speech_length {claimed!r} is not a number of 10 ms frames; correct it, or "
                         "leave the field out")
    if abs(claimed - frames) <= max(3, 0.02 * frames):
        return
    units = {"60 ms frames": frames / 6, "seconds": seconds, "milliseconds": seconds * 1000, "samples": seconds * 16000,
             "8 kHz samples": seconds * 8000}
    near = [unit for unit, value in units.items() if abs(claimed - value) <= max(1, 0.03 * value)]
    raise ValueError(f"{row['where']}: speech_length {claimed} does not count 10 ms frames, of which {row['source']} "
                     f"has {frames}" + (f"; {claimed} would be its {near[0]}" if near else "")
                     + "; correct it, or leave the field out")


def reason_to_drop(utterance, labels, cfg):
    """Why a training clip is left out, or ''. Lengths in FunASR's unit: 10 ms frames plus text tokens."""
    conf = "dataset_conf."
    if utterance["length"] > cfg[conf + "max_token_length"]:
        return f"longer than max_token_length={cfg[conf + 'max_token_length']}"
    if utterance["frames"] > cfg[conf + "max_source_length"]:
        return f"longer than max_source_length={cfg[conf + 'max_source_length']}"
    if utterance["frames"] < max(1, cfg[conf + "min_source_length"]):
        return f"shorter than min_source_length={cfg[conf + 'min_source_length']}"
    if labels > cfg[conf + "max_target_length"]:
        return f"text longer than max_target_length={cfg[conf + 'max_target_length']}"
    if not utterance["heard"] and not (cfg["distill_weight"] and utterance["kind"] == "simulated"):
        return "no transcript"
    return ""


def hotwords_of(row, cfg):
    """Hotwords that a row brings, as a list."""
    words = []
    for field in ("hotwords", "asr_hotwords"):
        value = row.get(field) if cfg[f"dataset_conf.prompt_conf.use_{field}"] else None
        words += [word.strip() for word in value.split(",")] if isinstance(value, str) else list(value or [])
    return [word for word in words if word]


def cut_batches(order, lengths, size, budget, world):
    """Cut indices (sorted by length) into batches of at most `size` clips and `budget` padded frames, per process."""
    batches, first, most, room = [], 0, size * world, budget * world
    while first < len(order):
        low, high = min(world, len(order) - first), min(most, len(order) - first)  # one clip a process at least
        count = high
        while low < high:  # what fits can be bisected, since clips get longer; mostly all do
            if lengths[order[first + count - 1]] * count <= room:
                low = count
            else:
                high = count - 1
            count = (low + high + 1) // 2
        if batches and low < world:  # too few for every process to have one
            first -= len(batches.pop())
            low = len(order) - first
        batches.append(order[first : first + low])
        first += low
    return batches


def epoch_batches(utterances, n_clean, cfg, world, epoch):
    """Batches (lists of indices) of one epoch, a pure function of seed and epoch: neighbours in length, shuffled.

    FunASR goes from short to long inside every buffer of sort_size clips; here the batches of an epoch are shuffled.
    The last `n_clean` utterances are the rehearsal: as many are drawn as make `data_mix` of the epoch.
    """
    rng, conf = random.Random(f"{cfg['seed']}-{epoch}"), "dataset_conf."
    split = len(utterances) - n_clean
    order, clean = list(range(split)), list(range(split, len(utterances)))
    wanted = round(cfg["data_mix"] / (1 - cfg["data_mix"]) * split) if clean else 0
    while wanted > 0:  # more than there are: the rehearsal is repeated
        order += rng.sample(clean, min(wanted, len(clean)))
        wanted -= len(clean)
    if len(order) < world:
        raise ValueError(f"{len(order)} clips are too few for {world} processes")
    if cfg[conf + "shuffle"]:
        rng.shuffle(order)
    example = cfg[conf + "batch_type"] == "example"
    size = cfg[conf + "batch_size"] if example else cfg[conf + "batch_size_sample_max"]
    budget = math.inf if example else cfg[conf + "batch_size"]
    unit = "frames" if cfg[conf + "batch_type"] == "length" else "length"
    # one measure for both limits: padded frames (and text), and the LLM's positions in the same currency
    scale = cfg[conf + "batch_size"] / cfg[conf + "batch_size_token_max"]
    lengths = [max(u[unit], 0 if example else u["positions"] * scale) for u in utterances]
    pool, batches = max(1, cfg[conf + "sort_size"]) * world, []
    pools = [order[start : start + pool] for start in range(0, len(order), pool)]
    if len(pools) > 1 and len(pools[-1]) < world:
        pools[-2] += pools.pop()
    for part in pools:
        batches += cut_batches(sorted(part, key=lengths.__getitem__), lengths, size, budget, world)
    if cfg[conf + "shuffle"]:
        rng.shuffle(batches)
    if epoch == 0:  # if memory does not suffice, the run ends in its first step and not in its last
        worst = max(range(len(batches)), key=lambda b: len(batches[b]) * max(lengths[i] for i in batches[b]))
        batches.insert(0, batches.pop(worst))
    return batches


class AudioClips(torch.utils.data.Dataset):
    """utterance -> (features (T, F), features of the clean twin or None, reason); random by seed, epoch and key.

    epoch None: for validation, nothing is random but the simulated line, which is the same every time.
    """

    def __init__(self, utterances, frontend, cfg, epoch=None):
        self.utterances, self.frontend, self.cfg, self.epoch = utterances, frontend, cfg, epoch
        nano = isinstance(frontend, model.NanoFrontend)
        self.wide = model.NanoFrontend(16000, "pretrained", frontend.dither, frontend.cmvn) if nano else frontend

    def __len__(self):
        return len(self.utterances)

    def __getitem__(self, index):
        try:
            return *self.featurise(self.utterances[index]), ""
        except model.AudioError as error:  # one second of silence without labels takes its place in the batch
            return self.wide.features(torch.zeros(16000)), None, str(error)

    def featurise(self, utterance):
        cfg, rate, key = self.cfg, self.frontend.sample_rate, utterance["key"]
        rng = random.Random(f"{cfg['seed']}-{self.epoch}-{key}")
        key = f"{self.epoch}-{key}"  # another dither in every epoch
        speed = 1.0 if self.epoch is None else rng.choice(cfg["dataset_conf.speed_perturb"])
        if utterance["kind"] == "telephone":
            wave = model.change_speed(model.load_audio(utterance["source"], rate), speed, rate)
            if self.epoch is not None and rng.random() < cfg["telephone_conf.prob"]:
                narrow = simulate_telephone(model.resample(wave, rate, 8000), cfg, rng)
                wave = model.resample(narrow, 8000, rate)[: len(wave)]
            return self.frontend.features(wave, key), None
        wave = model.change_speed(model.load_audio(utterance["source"], 16000), speed, 16000)
        wave = wave[: len(wave) // 2 * 2]  # an even number of samples: both rates then have the same frames
        clean = self.wide.features(wave, key)
        if utterance["kind"] == "clean":
            return clean, clean
        narrow = simulate_telephone(model.resample(wave, 16000, 8000), cfg, rng)
        heard = self.frontend.features(model.resample(narrow, 8000, rate)[: len(wave)], key)
        if len(heard) != len(clean):
            raise AssertionError(f"{key}: {len(heard)} frames through the line, {len(clean)} without")
        return heard, clean


def batches_of(utterances, batches, parts, cfg, epoch, bad):
    """Load batches as they come: dicts feats (B, T, F), lens, twin or None, has_twin, utterances, good, ids, ...

    good    False for a clip that could not be read: silence without labels takes its place.
    """
    loader = torch.utils.data.DataLoader(
        AudioClips(utterances, parts["frontend"], cfg, epoch), batch_sampler=batches, collate_fn=list,
        num_workers=cfg["dataset_conf.num_workers"],
        multiprocessing_context="fork" if cfg["dataset_conf.num_workers"] else None,
        generator=torch.Generator(),  # its own: the default would draw from the run's random state
    )
    masking = make_masking(cfg, is_stacked(parts["frontend"])) if epoch is not None else None
    for indices, items in zip(batches, loader):
        rows = [utterances[index] for index in indices]
        lens = torch.tensor([len(feats) for feats, _, _ in items])
        feats = pad_sequence([feats for feats, _, _ in items], batch_first=True)  # (B, T, F)
        has_twin = torch.tensor([twin is not None for _, twin, _ in items])
        twin = None
        if cfg["distill_weight"] and bool(has_twin.any()):
            twins = [feats if twin is None else twin for feats, twin, _ in items]
            twin = pad_sequence(twins, batch_first=True)
        if masking is not None:
            seed = int(model.hash_text([cfg["seed"], epoch, [u["key"] for u in rows]])[:12], 16)
            feats, lens = masking(feats, lens, torch.Generator().manual_seed(seed))
        for row, (_, _, reason) in zip(rows, items):
            if reason and all(other["source"] != row["source"] for other in bad):
                bad.append({"key": row["key"], "source": row["source"], "reason": reason})
        good = [not reason for _, _, reason in items]
        enc_lens = getattr(parts["nano"].audio_encoder, "out_lens", lambda lens: lens)(lens)
        yield {"feats": feats, "lens": lens, "twin": twin, "has_twin": has_twin, "utterances": rows, "good": good,
               "twin_frames": int((enc_lens * has_twin).sum()),
               "ids": [u["ids"] if ok else [] for u, ok in zip(rows, good)],
               "classes": [u["classes"] if ok else [] for u, ok in zip(rows, good)]}


# ---- model and losses -------------------------------------------------------------------------------------------


def encoder_blocks(encoder):
    """Blocks of an encoder from input to output."""
    if isinstance(encoder, model.SenseVoiceEncoder):
        return [*encoder.encoders0, *encoder.encoders, *encoder.tp_encoders]
    return model.encoder_layers(encoder)


def load_parts(cfg, device):
    """Model, tokenizers and front end. Output: dict, with `lines` that say what was loaded and `base_hash`."""
    conf, base, lines = nested(cfg), None, []
    sanm, scratch = cfg["audio_encoder"] == "SenseVoiceEncoderSmall", cfg["init_param"] == "scratch"
    own_symbols = cfg["dataset_conf.ctc_tokenizer"] != "SenseVoiceTokenizer"
    with_llm = sanm and not scratch and cfg["llm"] != "none"
    if not sanm and not own_symbols:
        raise ValueError(f"audio_encoder={cfg['audio_encoder']}: it has no CTC head; set dataset_conf.ctc_tokenizer to "
                         "char or word")
    if not sanm and cfg["frontend_conf.fs"] != 16000:
        raise ValueError(f"frontend_conf.fs=8000 is for Fun-ASR-Nano's front end; {cfg['audio_encoder']} takes 16000")
    if sanm and not scratch:
        name = cfg["init_param"] or cfg["model"]
        if name == "FunASRNano":
            raise ValueError("init_param: say where the weights are (model.pt or its folder), or give model its hub "
                             "name such as FunAudioLLM/Fun-ASR-Nano-2512")
        if name.endswith(".pt") and not Path(name).is_file():
            raise ValueError(f"init_param={name}: no such file")
        base = Path(name) if Path(name).is_file() else model.find_model(name) / "model.pt"
    symbols = None
    if own_symbols:
        symbols = json.loads((Path(cfg["init_run"]) / "config.json").read_text(encoding="utf-8"))["ctc_symbols"] if (
            cfg["init_run"]) else model.SymbolTokenizer.of_texts(
                cfg["dataset_conf.ctc_tokenizer"], training_texts(cfg)).symbols
    on_gpu = device.type == "cuda" and cfg["llm_conf.freeze"]
    llm_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[cfg["llm_conf.llm_dtype"]]
    nano, tokenizer = model.build_nano(conf, base and base.parent, llm_dtype if on_gpu else torch.float32, with_llm,
                                       bool(conf["ctc_decoder"]) or own_symbols, len(symbols) if symbols else None)
    random_ctc, base_hash, not_in_base = own_symbols and not cfg["init_run"], "", set()
    if base:
        weights = model.read_nano_weights(base)
        absent = model.load_nano_weights(nano, weights, base, model.CTC_PREFIXES)
        base_hash, random_ctc = model.hash_tensors(weights), bool(absent)
        lines.append(f"{base} (hash {base_hash}): {len(weights)} tensors, {len(nano.state_dict())} loaded, "
                     f"missing: {', '.join(absent) or 'none'}, mismatched: none")
        if absent and not cfg["ctc_weight"]:
            nano.ctc, nano.ctc_decoder = None, None
            lines.append("CTC branch: not in model.pt, and ctc_weight is 0: left out")
    elif sanm:
        not_in_base |= {f"audio_encoder.{name}" for name in nano.audio_encoder.state_dict()}
        lines.append("encoder: random weights (init_param=scratch)")
    else:
        base_hash = nano.audio_encoder.identity["weights"]
        lines.append(f"encoder {cfg['audio_encoder']} (hash {base_hash}), CTC head over {len(symbols)} symbols")
    if nano.ctc is not None and random_ctc:
        if cfg["ctc_decoder_conf.freeze"]:
            raise ValueError("the checkpoint has no trained CTC branch (Hugging Face's model.pt has none, ModelScope's "
                             "has), and a frozen random head would teach noise: set ctc_decoder_conf.freeze=false to "
                             "train one from scratch, or ctc_weight=0 to leave it out")
        lines.append("CTC branch: not in the checkpoint, trained from scratch")
    ctc_tokenizer = None
    if nano.ctc is not None:
        path = cfg["dataset_conf.ctc_tokenizer_conf.vocab_path"] or (base or Path()).parent / "multilingual.tiktoken"
        ctc_tokenizer = model.SymbolTokenizer(cfg["dataset_conf.ctc_tokenizer"], symbols) if own_symbols else (
            model.ctc_tokenizer_of(nano, path))
    lora = {"r": cfg["llm_conf.lora_conf.r"], "alpha": cfg["llm_conf.lora_conf.lora_alpha"], "dropout": 0.0,
            "targets": cfg["llm_conf.lora_conf.target_modules"]} if cfg["llm_conf.use_lora"] and with_llm else None
    if lora:
        model.add_lora(nano.llm, **lora)
    original = model.freeze(copy.deepcopy(nano.audio_encoder)) if cfg["distill_weight"] else None
    if cfg["init_run"]:
        first = json.loads((Path(cfg["init_run"]) / "config.json").read_text(encoding="utf-8"))
        if first["base_hash"] != base_hash:
            raise ValueError(f"init_run={cfg['init_run']}: was trained on another base (hash {first['base_hash']}, "
                             f"this is {base_hash}); give its init_param or audio_encoder")
        state = model.read_weights(Path(cfg["init_run"]) / "trained.pt")
        model.load_trained_part(nano, state, None, f"{cfg['init_run']}/trained.pt")
        not_in_base |= set(state)
        lines.append(f"{len(state)} tensors from {cfg['init_run']}/trained.pt")
    cmvn = model.load_cmvn(cfg["frontend_conf.cmvn_file"]) if cfg["frontend_conf.cmvn_file"] else None
    frontend = model.NanoFrontend(cfg["frontend_conf.fs"], cfg["frontend_conf.mel_axis"], cfg["frontend_conf.dither"],
                                  cmvn) if sanm else nano.audio_encoder
    return {"nano": nano, "frontend": frontend, "tokenizer": tokenizer, "ctc_tokenizer": ctc_tokenizer, "base": base,
            "base_hash": base_hash, "symbols": symbols, "lora": lora, "original": original, "random_ctc": random_ctc,
            "not_in_base": not_in_base, "bad": [], "lines": lines}


def training_texts(cfg):
    """All transcripts to train on, as CTC sees them: the source of its symbols."""
    for key in ("train_data_set_list", "telephone_conf.data_set_list", "clean_data_set_list"):
        for spec in (part.strip() for part in cfg[key].split(",") if part.strip()):
            for row in model.read_manifest(spec):
                text = row["target"].strip()
                yield model.normalize_text(text) if cfg["dataset_conf.ctc_target_normalize"] else text


def freeze_parts(nano, cfg):
    """Switch off what the configuration freezes, for good. Output: lines that say what trains."""
    frozen = {"audio_encoder": cfg["audio_encoder_conf.freeze"], "audio_adaptor": cfg["audio_adaptor_conf.freeze"],
              "llm": cfg["llm_conf.freeze"], "ctc_decoder": cfg["ctc_decoder_conf.freeze"],
              "ctc": cfg["ctc_decoder_conf.freeze"]}
    for name, module in nano.named_children():
        if frozen[name]:
            model.freeze(module)
    if nano.llm is not None:
        for parameter in model.lora_parameters(nano.llm).values():
            parameter.requires_grad_(True)
    encoder, lowest = nano.audio_encoder, cfg["audio_encoder_conf.freeze_layer_num"]
    if lowest > 0 and not cfg["audio_encoder_conf.freeze"]:
        blocks = encoder_blocks(encoder)
        if lowest >= len(blocks):
            raise ValueError(f"audio_encoder_conf.freeze_layer_num={lowest}: the encoder has {len(blocks)} blocks")
        for block in blocks[:lowest]:
            model.freeze(block)
        if isinstance(encoder, model.WhisperEncoder):
            for part in (encoder.net.conv1, encoder.net.conv2, encoder.net.embed_positions):
                model.freeze(part)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d):  # Parakeet's: a few padded calls must not move its statistics
            model.freeze(module)
    if isinstance(encoder, model.WhisperEncoder):
        encoder.net.embed_positions.requires_grad_(False)  # sinusoids
    elif isinstance(encoder, model.KaldiEncoder) and hasattr(encoder, "ctc_lo"):
        model.freeze(encoder.ctc_lo)  # SenseVoice's own head: no loss reaches it
    if cfg["audio_encoder_conf.activation_checkpoint"]:
        if isinstance(encoder, model.WhisperEncoder):
            encoder.net.gradient_checkpointing_enable()
        else:
            getattr(encoder, "net", encoder).gradient_checkpointing = True
    lines = []
    for name, module in nano.named_children():
        total = sum(p.numel() for p in module.parameters())
        trains = sum(p.numel() for p in module.parameters() if p.requires_grad)
        lines.append(f"{name}: {trains:,} trainable, {total - trains:,} frozen (and in eval mode)")
    return lines


def check_losses(nano, cfg):
    """Lines that say which loss reaches which weights; ValueError if a part trains that no loss reaches."""
    reach = {"llm": ["audio_encoder", "audio_adaptor", "llm"] if nano.llm is not None and cfg["llm_weight"] else [],
             "ctc": ["ctc_decoder", "ctc", *([] if cfg["detach_ctc_decoder"] else ["audio_encoder"])] if (
                 nano.ctc is not None and cfg["ctc_weight"]) else [],
             "distill": ["audio_encoder"] if cfg["distill_weight"] else []}
    if not any(reach.values()):
        raise ValueError("no loss is left: llm_weight, ctc_weight and distill_weight are 0, or what they need is not "
                         "loaded")
    trains = {name for name, part in nano.named_children() if any(p.requires_grad for p in part.parameters())}
    if not trains:
        raise ValueError("nothing trains: set audio_encoder_conf.freeze=false, or unfreeze another part")
    lines = []
    for loss, parts in reach.items():
        if parts:
            reached = ", ".join(part for part in parts if part in trains) or "nothing that trains"
            lines.append(f"{loss} (weight {cfg[f'{loss}_weight']:g}) reaches {reached}")
    for part in sorted(trains - {part for parts in reach.values() for part in parts}):
        why = "detach_ctc_decoder=true keeps CTC from it: set it to false, or llm_weight" if (
            part == "audio_encoder") else "freeze it, or give its loss a weight"
        raise ValueError(f"no loss reaches {part}, which is trainable; {why}")
    if cfg["detach_ctc_decoder"] and reach["ctc"] and "audio_encoder" in trains:
        lines.append("note: detach_ctc_decoder=true, so CTC does not train the encoder")
    return lines


class Finetune(nn.Module):
    """The model and its losses in one module, so that DDP wraps one forward pass."""

    def __init__(self, parts, cfg):
        super().__init__()
        self.nano, self.original, self.cfg, self.tokenizer = parts["nano"], parts["original"], cfg, parts["tokenizer"]

    def prompts(self, utterances):
        return [model.nano_prompt(self.tokenizer, hotwords=u["hotwords"]) for u in utterances]

    def forward(self, batch):
        """Sums over the batch: ce and right (label tokens), ctc and impossible (clips), distill (frames x width)."""
        nano, cfg = self.nano, self.cfg
        enc, lens = nano.encode(batch["feats"], batch["lens"])
        zero = enc.sum() * 0.0
        sums = {"ce": zero, "right": 0, "ctc": zero, "impossible": 0, "distill": zero}
        if nano.llm is not None and cfg["llm_weight"]:
            speech, speech_lens = nano.listen(enc, lens)
            prompts, smoothing = self.prompts(batch["utterances"]), cfg["model_conf.lsm_weight"]
            spliced = model.splice(nano.llm.get_input_embeddings(), prompts, speech, speech_lens, batch["ids"])
            sums["ce"], _, sums["right"] = model.transcript_loss(
                nano.llm, spliced, model.shared_prefix(prompts), smoothing if self.training else 0.0)
        if nano.ctc is not None and cfg["ctc_weight"]:
            log_probs, ctc_lens = nano.ctc_log_probs(enc.detach() if cfg["detach_ctc_decoder"] else enc, lens)
            sums["ctc"], sums["impossible"] = nano.ctc.loss(log_probs, ctc_lens, batch["classes"])
        if batch["twin"] is not None:
            with torch.no_grad():
                wanted, _ = self.original(batch["twin"], batch["lens"])
            keep = model.length_mask(lens, enc.shape[1]) & batch["has_twin"][:, None]
            sums["distill"] = (enc - wanted.float())[keep].pow(2).mean(-1).sum()
        return sums


def count_labels(batch, cfg):
    """What the losses of a batch are divided by: label tokens (or clips) of LLM and CTC, frames with a twin."""
    if cfg["model_conf.length_normalized_loss"]:
        ce, ctc = sum(map(len, batch["ids"])), sum(map(len, batch["classes"]))
    else:
        ce, ctc = (sum(1 for row in batch[name] if row) for name in ("ids", "classes"))
    return [ce, ctc, 0 if batch["twin"] is None else batch["twin_frames"]]


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def amp(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


# ---- the checklist, before anything trains ----------------------------------------------------------------------


def read_data(cfg, parts):
    """Training and validation lists, what was dropped, and lines that say so."""
    drops, lines = {}, []
    train = read_list(cfg["train_data_set_list"], "telephone", cfg, parts, drops)
    train += read_list(cfg["telephone_conf.data_set_list"], "simulated", cfg, parts, drops)
    clean = read_list(cfg["clean_data_set_list"], "clean", cfg, parts, drops)
    if not train:
        dropped = "; ".join(f"{reason}: {len(rows)}" for reason, rows in drops.items())
        raise ValueError("nothing to train on: give train_data_set_list or telephone_conf.data_set_list"
                         + (f" (dropped: {dropped})" if dropped else ""))
    if cfg["data_mix"] and not clean:
        raise ValueError("data_mix > 0 needs clean_data_set_list")
    if not cfg["data_mix"]:
        clean = []  # none of it is drawn
    if cfg["distill_weight"] and not clean and all(u["kind"] == "telephone" for u in train):
        raise ValueError("distill_weight needs clean speech to compare with: telephone_conf.data_set_list, or "
                         "clean_data_set_list with data_mix")
    prompt = sum(map(len, model.nano_prompt(parts["tokenizer"]))) if parts["tokenizer"] else 0
    lost = {}
    valid = {"telephone": read_list(cfg["valid_data_set_list"], "telephone", cfg, parts, lost, training=False),
             "simulated": read_list(cfg["clean_valid_data_set_list"], "simulated", cfg, parts, lost, training=False),
             "clean": read_list(cfg["clean_valid_data_set_list"], "clean", cfg, parts, lost, training=False)}
    if not any(valid.values()):
        raise ValueError("nothing to score on: give valid_data_set_list or clean_valid_data_set_list")
    texts = any(u["target"] for rows in valid.values() for u in rows) and (cfg["ctc_weight"] or cfg["llm_weight"])
    if not texts and not (cfg["distill_weight"] and valid["clean"]):
        raise ValueError("validation has nothing to score: it has no transcripts, or neither CTC nor LLM has a weight, "
                         "and there is no clean_valid_data_set_list with distill_weight")
    for utterance in [*train, *clean, *(u for rows in valid.values() for u in rows)]:
        utterance["classes"] = parts["ctc_tokenizer"].encode(utterance["heard"]) if parts["ctc_tokenizer"] else []
        utterance["positions"] = (prompt + model.llm_positions(model.lfr_frames(utterance["frames"]))
                                  + len(utterance["ids"])) if parts["tokenizer"] else 0
    parts["bad"] = [{"key": key, "source": source, "reason": reason} for _, key, source, reason in
                    [*drops.get("unreadable", []), *lost.get("unreadable", [])]]
    if len(parts["bad"]) > cfg["dataset_conf.retry"]:
        raise ValueError(f"{len(parts['bad'])} clips cannot be read, more than dataset_conf.retry="
                         f"{cfg['dataset_conf.retry']}; the last is {parts['bad'][-1]['reason']}")
    for name, rows in (("train", train), ("clean rehearsal", clean), *valid.items()):
        lines.append(f"{name}: {len(rows)} clips, {sum(u['seconds'] for u in rows) / 3600:.3f} h")
    for reason, rows in {**drops, **{f"{k} (validation)": v for k, v in lost.items()}}.items():
        longest = max(rows)
        lines.append(f"left out, {reason}: {len(rows)} clips, {sum(row[0] for row in rows) / 3600:.3f} h; the longest "
                     f"is {longest[1]} ({longest[0]:.1f} s)")
    return {"train": train + clean, "n_clean": len(clean), "valid": valid, "lines": lines}


def check_output(cfg, nano):
    """Writable, and room for what the run will keep."""
    if not cfg["output_dir"]:
        raise ValueError("output_dir: say where the run goes")
    folder = Path(cfg["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe.{os.getpid()}"  # every process has its own
    write_atomic(probe, lambda file: file.write(b"x"))
    probe.unlink()
    one = 4 * sum(p.numel() for p in nano.parameters() if p.requires_grad)
    count = cfg["train_conf.keep_nbest_models"] + 2  # the average and the result
    needed, free = one * (count + 3), shutil.disk_usage(folder).free  # last.pt: weights and two moments
    free += sum(path.stat().st_size for path in folder.glob("*.pt"))  # of a run that goes on: they are replaced
    if needed > free:
        raise ValueError(f"output_dir={folder}: {free / 2**30:.1f} GiB free, {needed / 2**30:.1f} GiB needed for "
                         f"{count} checkpoints and last.pt; lower train_conf.keep_nbest_models")
    return [f"{folder}: writable, {free / 2**30:.1f} GiB free, at most {needed / 2**30:.2f} GiB needed ({count} "
            f"checkpoints of {one / 2**20:.0f} MiB, and last.pt)"]


def estimate_memory(cfg, parts):
    """A rough peak in bytes, from counts: weights, gradients and moments, activations of the largest batch."""
    nano, block_bytes = parts["nano"], 34 * 4  # bytes that a block keeps for the backward pass, per frame and dimension
    held = [*nano.parameters(), *(parts["original"].parameters() if parts["original"] is not None else ())]
    weights = sum(p.numel() * p.element_size() for p in held)
    trains = sum(p.numel() for p in nano.parameters() if p.requires_grad)
    frames = cfg["dataset_conf.batch_size"] * 10 / getattr(parts["frontend"], "frame_ms", 60.0)
    blocks = len(encoder_blocks(nano.audio_encoder))
    width = getattr(nano.audio_encoder, "width", cfg["audio_encoder_conf.output_size"])
    activations = 0 if cfg["audio_encoder_conf.freeze"] else frames * width * block_bytes * (
        blocks**0.5 if cfg["audio_encoder_conf.activation_checkpoint"] else blocks)
    logits = 4 * 4 * frames * (nano.ctc.blank + 1) if nano.ctc is not None and cfg["ctc_weight"] else 0
    if nano.llm is not None and cfg["llm_weight"]:
        sizes, positions = nano.llm.config, frames / 8 + 40 * cfg["dataset_conf.batch_size_sample_max"]
        activations += positions * sizes.hidden_size * sizes.num_hidden_layers * block_bytes
        logits += 4 * 4 * 20 * cfg["dataset_conf.batch_size_sample_max"] * sizes.vocab_size  # of label positions
    return weights + 12 * trains + activations + logits  # gradient and two moments in fp32


def checklist(cfg, device):
    """Go through everything that can be known before training. Output: [(ok, title, lines)], parts and data (or None).

    A later point that needs a failed earlier one is left out.
    """
    found, parts, data = [], None, None

    def point(title, work):
        try:
            result = work()
            found.append((True, title, result["lines"] if isinstance(result, dict) else result))
            return result
        except (ValueError, OSError) as error:
            found.append((False, title, [" ".join(str(error).split())]))
            return None

    parts = point("pretrained weights", lambda: load_parts(cfg, device))
    if parts:
        point("what trains", lambda: freeze_parts(parts["nano"], cfg))
        point("losses", lambda: check_losses(parts["nano"], cfg))
    point("learning rate", lambda: check_rates(cfg))
    point("front end", lambda: describe_frontend(cfg))
    if parts:
        point("SpecAug", lambda: describe_masking(cfg, 0.06 if is_stacked(parts["frontend"]) else 0.01))
        data = point("data", lambda: read_data(cfg, parts))
        point("output", lambda: check_output(cfg, parts["nano"]))
        point("memory", lambda: [f"about {estimate_memory(cfg, parts) / 2**30:.1f} GiB at the peak, by a rough "
                                 "count of weights, moments and activations"])
    return found, parts, data


def check_rates(cfg):
    lr, lines = cfg["optim_conf.lr"], []
    if not 0 < lr < 0.1:
        raise ValueError(f"optim_conf.lr={lr:g} is no learning rate for AdamW")
    lines.append(f"peak {lr:g} after {cfg['scheduler_conf.warmup_steps']} steps, then by 1/sqrt(step); layer decay "
                 f"{cfg['optim_conf.layer_decay']:g}; CTC {cfg['optim_conf.ctc_lr'] or lr:g}")
    if not cfg["audio_encoder_conf.freeze"] and lr > 1e-4:
        lines.append("note: more than 1e-4 for a pretrained encoder forgets quickly")
    return lines


def describe_masking(cfg, frame_s):
    if not cfg["specaug"]:
        return ["off"]
    make_masking(cfg, True)  # refuses ranges that make no sense
    time, ratio = cfg["specaug_conf.time_mask_width_range"], cfg["specaug_conf.time_mask_max_ratio"]
    return [f"{cfg['specaug_conf.num_freq_mask']} x up to {cfg['specaug_conf.freq_mask_width_range'][1]} mel bins, "
            f"{cfg['specaug_conf.num_time_mask']} x up to {time[1]} frames ({frame_s * time[1]:.2f} s), each at most "
            f"{100 * ratio:g} % of its clip"]


def describe_frontend(cfg):
    if cfg["frontend_conf.fs"] != 8000:
        return [f"{cfg['frontend_conf.fs']} Hz; other rates are resampled"]
    if cfg["frontend_conf.mel_axis"] == "native":
        return ["warning: mel_axis=native at 8 kHz is FunASR's warped axis, about 1 nat off what the encoder was "
                "trained on; the default `pretrained` is not"]
    return ["native 8 kHz without resampling, on the pretrained mel axis"]


def print_checklist(found, cfg, verbose):
    for ok, title, lines in found:
        for line in lines:
            print(f"{'ok  ' if ok else 'FAIL'}  {title}: {line}")
    for key, why in NO_EFFECT.items():
        if verbose or cfg[key] != DEFAULTS[key] and not str(DEFAULTS[key]).startswith("${"):
            print(f"note  {key}={cfg[key]} changes nothing: {why}")
    if cfg["audio_encoder"] != "SenseVoiceEncoderSmall":
        used = ("audio_encoder_conf.freeze", "audio_encoder_conf.freeze_layer_num",
                "audio_encoder_conf.activation_checkpoint", "frontend_conf.fs")
        sections = ("audio_encoder_conf.", "audio_adaptor_conf.", "frontend_conf.", "llm_conf.")
        for key in cfg:
            if key.startswith(sections) and key not in used and cfg[key] != DEFAULTS[key]:
                print(f"note  {key}={cfg[key]} changes nothing: {cfg['audio_encoder']} has its own front end and "
                      "sizes, and no LLM behind it")


# ---- bookkeeping of a run (trim_metrics, log_metrics and write_bad as in the other scripts) -------------------------


def learning_rate(step, cfg):
    """FunASR's warmuplr as a pure function of the step (0, 1, ...): linear to the peak, then by 1/sqrt(step)."""
    n, warmup = step + 1, cfg["scheduler_conf.warmup_steps"]
    return cfg["optim_conf.lr"] * (min(n / warmup, math.sqrt(warmup / n)) if warmup else 1.0)


def make_optimizer(nano, cfg, device):
    """AdamW; `scale` of a group is its share of the learning rate: lower blocks and the CTC branch have their own."""
    blocks = encoder_blocks(nano.audio_encoder)
    depth = {id(p): len(blocks) - 1 - n for n, block in enumerate(blocks) for p in block.parameters()}
    groups = {}
    for name, parameter in nano.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if name.startswith(model.CTC_PREFIXES):
            scale = (cfg["optim_conf.ctc_lr"] or cfg["optim_conf.lr"]) / cfg["optim_conf.lr"]
        elif name.startswith("audio_encoder."):  # outside the blocks: norms above them, convolutions below
            outside = 0 if "norm" in name else len(blocks)
            scale = cfg["optim_conf.layer_decay"] ** depth.get(id(parameter), outside)
        decay = cfg["optim_conf.weight_decay"] if parameter.ndim > 1 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    groups = [{"params": params, "scale": scale, "weight_decay": decay} for (scale, decay), params in groups.items()]
    return torch.optim.AdamW(groups, lr=cfg["optim_conf.lr"], betas=cfg["optim_conf.betas"],
                             fused=device.type in ("cuda", "cpu"))


def open_run(cfg, rank):
    """Make output_dir, or open it again to resume. Output: content of last.pt, or None."""
    folder = Path(cfg["output_dir"])
    last, state = folder / "last.pt", None
    used = (folder / "metrics.jsonl").exists() or last.exists()
    if used and not cfg["train_conf.resume"]:
        raise ValueError(f"{folder}: already holds a run; give another output_dir, or train_conf.resume=true to go on")
    if last.exists():
        try:
            state = torch.load(last, map_location="cpu", weights_only=True)
        except Exception as error:  # torn, or a pickle with code in it: weights_only refuses it
            raise ValueError(f"{last}: not a checkpoint of this script ({type(error).__name__}); not loaded") from error
        changed = [f"{k}: {v!r} -> {cfg[k]!r}" for k, v in state["config"].items() if k in cfg and cfg[k] != v]
        if rank == 0:
            print(f"resuming at step {state['step']}; changed: {', '.join(changed) or 'nothing'}")
    if rank == 0:
        write_atomic(folder / "config.yaml", lambda file: file.write(yaml.safe_dump(cfg, sort_keys=False).encode()))
    return state


def trim_metrics(path, step):
    """Drop the lines that a killed run wrote after its last checkpoint; they will be written again."""
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= step]
        write_atomic(path, lambda file: file.writelines(line.encode() for line in kept))


def log_metrics(path, writer, step, values):
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step} | {k: round(float(v), 6) for k, v in values.items()}) + "\n")
    for name, value in values.items():
        writer.add_scalar(name, value, step)


def all_bad(bad):
    """Rows of clips that could not be used, of all processes, each file once."""
    parts = [bad] * rank_and_world()[1]
    if dist.is_initialized():
        dist.all_gather_object(parts, bad)
    return list({row["source"]: row for part in parts for row in part}.values())


def write_bad(folder, bad):
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in bad]
    write_atomic(folder / "bad.jsonl", lambda file: file.writelines(lines))


def trained_state(parts):
    """What makes this model of its base, by name: what trains, and what came from init_run or from random weights."""
    nano = parts["nano"]
    names = {name for name, parameter in nano.named_parameters() if parameter.requires_grad} | parts["not_in_base"]
    return {name: value.detach().cpu() for name, value in nano.state_dict().items() if name in names}


def save_trained(path, state):
    write_atomic(path, lambda file: torch.save(state, file))


def describe_run(cfg, parts):
    """config.json: what load_nano and `merge` need beside trained.pt."""
    conf = {k: v for k, v in nested(cfg).items() if k in (
        "audio_encoder", "audio_encoder_conf", "audio_adaptor_conf", "llm_conf", "ctc_decoder", "ctc_decoder_conf",
        "ctc_conf", "ctc_vocab_size", "frontend_conf")}
    nano = parts["nano"]
    if Path(conf["audio_encoder"]).exists():  # infer.py may be started elsewhere
        conf["audio_encoder"] = str(Path(conf["audio_encoder"]).resolve())
    return {"format": 1, "script": "finetune_encoder", "conf": conf,
            "base": str(parts["base"].resolve()) if parts["base"] else None, "base_hash": parts["base_hash"],
            "with_llm": nano.llm is not None, "with_ctc": nano.ctc is not None, "lora": parts["lora"],
            "ctc_symbols": parts["symbols"], "ctc_kind": cfg["dataset_conf.ctc_tokenizer"],
            "ctc_vocab": cfg["dataset_conf.ctc_tokenizer_conf.vocab_path"]}


# ---- validation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(tuner, sets, parts, cfg, device, dtype, decode):
    """Error rates of the CTC read-out and, on `decode` clips of each set, of the LLM; distillation distance.

    Output  {telephone_ctc_er: ...}, {set: [(key, target, LLM text or None, CTC text or None)]}
    """
    tuner.eval()
    nano, scores, texts = tuner.nano, {}, {}
    for name, utterances in sets.items():
        if not utterances:
            continue
        rows, distance, frames = [], 0.0, 0
        lengths = [utterance["frames"] for utterance in utterances]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        count = min(decode, len(order))  # of every length, not the shortest ones
        decoded = {order[(2 * number + 1) * len(order) // (2 * count)] for number in range(count)}
        budget = math.inf if cfg["dataset_conf.batch_type"] == "example" else cfg["dataset_conf.batch_size"]
        batches = cut_batches(order, lengths, 16, budget, 1)
        for indices, batch in zip(batches, batches_of(utterances, batches, parts, cfg, None, parts["bad"])):
            batch = to_device(batch, device)
            with amp(device, dtype):
                enc, lens = nano.encode(batch["feats"], batch["lens"])
                if batch["twin"] is not None:
                    wanted, _ = tuner.original(batch["twin"], batch["lens"])
                    keep = model.length_mask(lens, enc.shape[1]) & batch["has_twin"][:, None]
                    distance += float((enc - wanted.float())[keep].pow(2).mean(-1).sum())
                    frames += int(keep.sum())
                heard, said = [None] * len(lens), [None] * len(lens)
                if nano.ctc is not None:
                    log_probs, ctc_lens = nano.ctc_log_probs(enc, lens)
                    heard = [parts["ctc_tokenizer"].decode(path)
                             for path in model.ctc_greedy(log_probs, ctc_lens, nano.ctc.blank)]
                places = [place for place, index in enumerate(indices) if index in decoded]
                if nano.llm is not None and places:
                    texts_of = read_llm(tuner, enc[places], lens[places], [batch["utterances"][i] for i in places])
                    said = [dict(zip(places, texts_of)).get(place) for place in range(len(lens))]
            rows += [(u["key"], u["target"], a, b)
                     for u, a, b, good in zip(batch["utterances"], said, heard, batch["good"]) if good]
        for kind, column in (("llm_er", 2), ("ctc_er", 3)):
            pairs = [(row[1], row[column]) for row in rows if row[column] is not None and row[1]]
            if pairs:
                scores[f"{name}_{kind}"] = model.error_rate(*zip(*pairs))["rate"]
        if frames:
            scores[f"{name}_distill"] = distance / frames
        texts[name] = rows
    tuner.train()
    return scores, texts


def read_llm(tuner, enc, lens, utterances):
    """Greedy transcripts of the LLM."""
    nano, tokenizer = tuner.nano, tuner.tokenizer
    speech, speech_lens = nano.listen(enc, lens)
    spliced = model.splice(nano.llm.get_input_embeddings(), tuner.prompts(utterances), speech, speech_lens,
                           pad_left=True)
    caps = [model.token_cap(u["seconds"]) for u in utterances]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    answers, _ = model.greedy_decode(nano.llm, spliced, stop, caps)
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]


def score_of(scores, cfg):
    """The number that decides which checkpoint is better: of telephone speech, of the read-out that trains most."""
    kinds = (["llm_er"] if cfg["llm_weight"] else []) + (["ctc_er"] if cfg["ctc_weight"] else []) + ["distill"]
    for name in ("telephone", "simulated", "clean"):
        for kind in kinds:
            if f"{name}_{kind}" in scores:
                return scores[f"{name}_{kind}"]
    raise ValueError("validation has nothing to score: no transcripts, and no distillation on simulated speech")


# ---- the run ----------------------------------------------------------------------------------------------------


def stream(data, parts, cfg, world, rank, first_epoch, used):
    """Batches of this process from (epoch, used) to the last epoch: yields epoch, used, last of its epoch, batch."""
    for epoch in range(first_epoch, cfg["train_conf.max_epoch"]):
        batches = epoch_batches(data["train"], data["n_clean"], cfg, world, epoch)
        mine = [batch[rank::world] for batch in batches[used:]]
        for batch in batches_of(data["train"], mine, parts, cfg, epoch, parts["bad"]):
            used += 1
            yield epoch, used, used == len(batches), batch
        used = 0


def train_step(wrapped, optimizer, scaler, micro, cfg, device, dtype, world, window):
    """One optimizer step over the micro-batches; adds to `window`. Output: gradient norm before clipping."""
    counts = torch.tensor([count_labels(batch, cfg) for batch in micro], dtype=torch.float64).sum(0)
    if world > 1:
        counts = model.upload(counts, device)
        dist.all_reduce(counts)
    # of the whole step, all processes; tensors, so that nobody waits for what others count
    totals = dict(zip(("ce", "ctc", "distill"), counts.clamp(min=1).float().unbind()))
    weights = {"ce": cfg["llm_weight"], "ctc": cfg["ctc_weight"], "distill": cfg["distill_weight"]}
    for batch in micro:
        with amp(device, dtype):
            sums = wrapped(to_device(batch, device))
        loss = sum(weights[name] * sums[name].float() / totals[name] for name in totals)
        scaler.scale(loss * world).backward()  # DDP averages over processes, we want the sum
        for name in ("ce", "ctc", "distill", "right", "impossible"):
            value = sums[name]
            window[name] += value.detach() if isinstance(value, torch.Tensor) else value
        for name, count in zip(("n_ce", "n_ctc", "n_distill"), count_labels(batch, cfg)):
            window[name] += count
        window["labels"] += sum(map(len, batch["ids"]))
        window["audio_s"] += sum(u["seconds"] for u in batch["utterances"])
    scaler.unscale_(optimizer)  # clip real, not scaled, gradients
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trainable, cfg["train_conf.grad_clip"])
    if not scaler.is_enabled() and not bool(norm.isfinite()):
        clips = ", ".join(u["key"] for batch in micro for u in batch["utterances"])
        raise ValueError(f"the gradient is not finite, clips {clips}: nothing was changed by this step; lower "
                         "optim_conf.lr or leave these clips out")
    scaler.step(optimizer)  # fp16: skipped on overflow
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def keep_best(folder, kept, step, score, state, cfg):
    """Write this checkpoint if it is among the best keep_nbest_models and remove the one it pushes out."""
    ranked = sorted([*kept, [score, step]])[: max(1, cfg["train_conf.keep_nbest_models"])]
    if [score, step] in ranked:
        save_trained(folder / f"step-{step:06d}.pt", state)
    for _, old in kept:
        if old not in [number for _, number in ranked]:
            (folder / f"step-{old:06d}.pt").unlink(missing_ok=True)
    return ranked


def main(cfg):
    cfg = finish_config(cfg)
    device, _ = pick_device(cfg | {"dtype": "fp32"})
    dtype = {"use_bf16": torch.bfloat16, "use_fp16": torch.float16}.get(
        next((name for name in ("use_bf16", "use_fp16") if cfg[f"train_conf.{name}"]), ""), torch.float32)
    model.allow_tf32(cfg["enable_tf32"])
    rank, world = rank_and_world()
    torch.manual_seed(cfg["seed"])
    found, parts, data = checklist(cfg, device)
    if rank == 0:
        print_checklist(found, cfg, verbose=False)
    if failed := [(title, lines[0]) for ok, title, lines in found if not ok]:
        raise ValueError(f"{failed[0][0]}: {failed[0][1]}")
    folder, state = Path(cfg["output_dir"]), open_run(cfg, rank)
    tuner = Finetune(parts, cfg).to(device)
    nano, metrics, writer = tuner.nano, folder / "metrics.jsonl", None
    optimizer = make_optimizer(nano, cfg, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    wrapped = nn.parallel.DistributedDataParallel(tuner, broadcast_buffers=False) if world > 1 else tuner
    step, epoch, used, spent, kept, idle, best = 0, 0, 0, 0.0, [], 0, math.inf
    if state:
        if state["base_hash"] != parts["base_hash"]:
            raise ValueError(f"{folder}/last.pt was trained on another base ({state['base_hash']}, now "
                             f"{parts['base_hash']})")
        model.load_trained_part(nano, state["trained"], None, f"{folder}/last.pt")
        ours = [{k: group[k] for k in ("scale", "weight_decay", "betas")} for group in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(optimizer.param_groups, ours):  # as configured now; load_state_dict brings the old
            group.update(settings)
        scaler.load_state_dict(state["scaler"])
        step, epoch, used, spent, kept, idle, best = (
            state[k] for k in ("step", "epoch", "used", "seconds", "kept", "idle", "best"))
        kept = [item for item in kept if (folder / f"step-{item[1]:06d}.pt").is_file()]  # a later one pushed it out
    if rank == 0:
        trim_metrics(metrics, step)
        writer = SummaryWriter(folder, purge_step=step + 1)
    before = score_before(tuner, data, parts, cfg, device, dtype, folder, rank)
    accum = cfg["train_conf.accum_grad"]
    per_epoch = [len(epoch_batches(data["train"], data["n_clean"], cfg, world, e))
                 for e in range(cfg["train_conf.max_epoch"])]
    left = sum(per_epoch[epoch:]) - min(used, per_epoch[epoch] if epoch < len(per_epoch) else 0)
    total = min(cfg["train_conf.max_steps"] or math.inf, step + -(-left // accum))  # resumed with other batches, too
    if rank == 0:
        print(f"{total} steps, {per_epoch[0]} batches in epoch 0 x {world} processes, {accum} a step; {dtype}, "
              f"{device}, torch {torch.__version__}, seed {cfg['seed']}", flush=True)
    tuner.train()
    batches, window, started = stream(data, parts, cfg, world, rank, epoch, used), new_window(), time.time()
    bar = tqdm(total=total, initial=step, unit="step", disable=rank != 0 or None)
    patience, stop = cfg["train_conf.early_stopping_patience"], False
    while step < total and not stop:
        torch.manual_seed(int(model.hash_text([cfg["seed"], step, rank])[:15], 16))  # dropout: a function of the step
        lr = learning_rate(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        drawn = [item for item in (next(batches, None) for _ in range(accum)) if item is not None]
        epoch, used = drawn[-1][:2]
        epoch_ends = any(item[2] for item in drawn)
        norm = train_step(wrapped, optimizer, scaler, [item[3] for item in drawn], cfg, device, dtype, world, window)
        step += 1
        window["steps"] += 1
        bar.update(1)
        last = step == total
        if len(parts["bad"]) > cfg["dataset_conf.retry"]:
            write_bad(folder, parts["bad"])  # as this process knows them; the others are in the next step already
            raise ValueError(f"{len(parts['bad'])} clips cannot be used, more than dataset_conf.retry="
                             f"{cfg['dataset_conf.retry']}; the last is {parts['bad'][-1]['reason']}")
        if rank == 0 and (step % cfg["train_conf.log_interval"] == 0 or last):
            log_window(window, step, total, lr, norm, len(parts["bad"]), metrics, writer, bar)
            window = new_window()
        if step % cfg["train_conf.validate_interval"] == 0 or epoch_ends or last:
            scores, _ = evaluate(tuner, data["valid"], parts, cfg, device, dtype, cfg["train_conf.valid_decode"])
            score = torch.tensor(score_of(scores, cfg), dtype=torch.float64, device=device)
            if world > 1:
                dist.broadcast(score, 0)  # the processes must agree on when to stop
            score = float(score)
            idle = 0 if score < best else idle + 1
            best = min(best, score)
            stop = bool(patience) and idle >= patience
            if rank == 0:
                log_metrics(metrics, writer, step, scores)
                tqdm.write(f"  valid {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items())
                           + ("  no better for so long: stopping" if stop else ""))
                kept = keep_best(folder, kept, step, score, trained_state(parts), cfg)
        if rank == 0 and (step % cfg["train_conf.save_checkpoint_interval"] == 0 or epoch_ends or last or stop):
            state = {"format": 1, "trained": trained_state(parts), "optimizer": optimizer.state_dict(),
                     "scaler": scaler.state_dict(), "step": step, "epoch": epoch, "used": used, "kept": kept,
                     "idle": idle, "best": best, "base_hash": parts["base_hash"], "config": cfg,
                     "seconds": spent + time.time() - started}
            write_atomic(folder / "last.pt", lambda file, state=state: torch.save(state, file))
    bar.close()
    named = all_bad(parts["bad"])
    if rank == 0:
        write_bad(folder, named)
        finish(tuner, data, parts, cfg, device, dtype, kept, before, metrics, writer, step)
        print(f"done: {step} steps, {spent + time.time() - started:.0f} s -> {folder}")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def score_before(tuner, data, parts, cfg, device, dtype, folder, rank):
    """Error rates of the untouched model on every set, once a run."""
    path, heard = folder / "before.json", model.hash_text({k: [u["key"] for u in v] for k, v in data["valid"].items()})
    if not path.is_file():
        scores, texts = evaluate(tuner, data["valid"], parts, cfg, device, dtype, sys.maxsize)
        if parts["random_ctc"]:  # it reads noise
            scores = {k: v for k, v in scores.items() if not k.endswith("ctc_er")}
        if rank == 0:
            text = json.dumps({"scores": scores, "clips": heard, "texts": texts}, ensure_ascii=False)
            write_atomic(path, lambda file: file.write(text.encode()))
        return scores
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("clips", heard) != heard:
        raise ValueError(f"{path}: scored other validation clips than there are now, so that before and after would "
                         "not compare; give the lists that the run began with, or another output_dir")
    return found["scores"]


def new_window():
    return dict.fromkeys(("ce", "ctc", "distill", "right", "impossible", "n_ce", "n_ctc", "n_distill", "labels",
                          "audio_s", "steps"), 0) | {"started": time.time()}


def log_window(window, step, total, lr, norm, bad, metrics, writer, bar):
    """One line per interval: losses averaged over the interval (of process 0)."""
    values = {name: float(window[name]) / window[f"n_{name}"] for name in ("ce", "ctc", "distill")
              if window[f"n_{name}"]}
    if window["labels"] and "ce" in values:
        values["acc"] = float(window["right"]) / window["labels"]
    values |= {"lr": lr, "grad_norm": norm, "audio_s_per_s": window["audio_s"] / (time.time() - window["started"]),
               "impossible": window["impossible"], "bad": bad}
    log_metrics(metrics, writer, step, values)
    bar.set_postfix(lr=f"{lr:.1e}")
    memory = f" {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    losses = " ".join(f"{name} {values[name]:8.4f}" for name in ("ce", "ctc", "distill") if name in values)
    tqdm.write(f"{step:6d}/{total} {losses} lr {lr:.2e} norm {float(norm):8.3f} {values['audio_s_per_s']:7.1f} "
               f"audio s/s{memory}")


def finish(tuner, data, parts, cfg, device, dtype, kept, before, metrics, writer, step):
    """Average the best checkpoints, keep the better of average and best, and tell what the run has changed."""
    folder, names = Path(cfg["output_dir"]), kept[: max(1, cfg["train_conf.avg_nbest_model"])]
    if not names:
        raise ValueError(f"{folder}: no checkpoint is left to choose from; start again in another output_dir")
    states = [model.read_weights(folder / f"step-{number:06d}.pt") for _, number in names]
    average = {key: torch.stack([state[key].float() for state in states]).mean(0) for key in states[0]}
    save_trained(folder / "avg.pt", average)
    results = {}
    for name, state in (("best", states[0]), ("average", average)):
        model.load_trained_part(tuner.nano, state, None, name)
        results[name] = evaluate(tuner, data["valid"], parts, cfg, device, dtype, sys.maxsize)
    chosen = min(results, key=lambda name: score_of(results[name][0], cfg))
    save_trained(folder / "trained.pt", states[0] if chosen == "best" else average)
    text = json.dumps(describe_run(cfg, parts), ensure_ascii=False, indent=1)
    write_atomic(folder / "config.json", lambda file: file.write(text.encode()))
    after, texts = results[chosen]
    log_metrics(metrics, writer, step, {f"final_{k}": v for k, v in after.items()})
    table = ["| set | read-out | before | after |", "|---|---|---|---|"]
    for name in data["valid"]:
        for kind, label in (("llm_er", "LLM"), ("ctc_er", "CTC")):
            if f"{name}_{kind}" in after:
                old = f"{100 * before[f'{name}_{kind}']:.1f} %" if f"{name}_{kind}" in before else "–"
                table.append(f"| {name} dev | {label} | {old} | {100 * after[f'{name}_{kind}']:.1f} % |")
    worst = worst_lines(next(rows for rows in texts.values() if rows))
    chosen_text = (f"{chosen} checkpoint (steps {', '.join(str(number) for _, number in names)} averaged)"
                   if chosen == "average" else f"best checkpoint, step {names[0][1]}")
    print("\n".join([*table, f"\n{chosen_text}; worst utterances:", *worst]))
    write_atomic(folder / "table.md", lambda file: file.write(("\n".join(table) + "\n").encode()))
    write_atomic(folder / "worst.txt", lambda file: file.write(("\n".join(worst) + "\n").encode()))
    results = {"before": before, "after": after, "chosen": chosen, "best": results["best"][0],
               "average": results["average"][0], "steps": step, "seed": cfg["seed"]}
    write_atomic(folder / "results.json", lambda file: file.write(json.dumps(results, indent=1).encode()))
    plot_curves(metrics, folder / "curves.png")


def worst_lines(rows, count=10):
    """The utterances with the most errors, differences marked: [-missed-] {+wrong+}."""
    def errors(row):
        return model.error_rate([row[1]], [row[2] if row[2] is not None else row[3] or ""])

    lines = []
    for key, target, said, heard in sorted(rows, key=lambda row: -min(errors(row)["rate"], 9.0))[:count]:
        reference, text = model.normalize_text(target), model.normalize_text(said if said is not None else heard or "")
        language = "zh" if any(map(model.is_cjk, reference)) else "en"
        one, two, marked = model.score_units(reference, language), model.score_units(text, language), []
        for edit in Levenshtein.opcodes(one, two):
            if edit.tag == "equal":
                marked.append(" ".join(one[edit.src_start : edit.src_end]))
                continue
            gone, new = " ".join(one[edit.src_start : edit.src_end]), " ".join(two[edit.dest_start : edit.dest_end])
            marked.append((f"[-{gone}-]" if gone else "") + (f"{{+{new}+}}" if new else ""))
        lines.append(f"{key}: {' '.join(marked)}")
    return lines


# ---- pictures and merging -----------------------------------------------------------------------------------------


def figures():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def plot_curves(metrics, path):
    """Losses and error rates over the steps."""
    plt = figures()
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        if name in ("ce", "ctc", "distill"):
            left.plot(*zip(*points), label=name)
        elif name.endswith("_er") and not name.startswith("final"):
            right.plot(*zip(*points), marker=".", label=name)
    left.set(xlabel="optimizer step", ylabel="loss, nats per label", yscale="log")
    right.set(xlabel="optimizer step", ylabel="error rate")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    save_figure(figure, path)


def save_figure(figure, path):
    figure.tight_layout()
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    write_atomic(path, lambda target: target.write(file.getvalue()))
    figures().close(figure)


def show(clip, cfg):
    """PNG of what a configuration does to one clip: as it is, through the simulated line, with SpecAug's masks."""
    cfg = finish_config(cfg)
    plt, frontend = figures(), model.NanoFrontend(cfg["frontend_conf.fs"], cfg["frontend_conf.mel_axis"],
                                                  cfg["frontend_conf.dither"])
    wave, rng = model.load_audio(clip, 8000), random.Random(cfg["seed"])
    through = simulate_telephone(wave, cfg, rng)
    pictures = []
    for title, signal in (("before", wave), ("through the simulated telephone line", through)):
        feats = frontend.features(model.resample(signal, 8000, frontend.sample_rate), title)  # (T, 560)
        pictures.append((title, feats))
    masking = make_masking(cfg, stacked=True)
    if masking is not None:
        feats = pictures[-1][1][None]
        masked, _ = masking.train()(feats, torch.tensor([feats.shape[1]]), torch.Generator().manual_seed(cfg["seed"]))
        pictures.append(("masked by SpecAugLFR", masked[0]))
    figure, axes = plt.subplots(len(pictures), 1, figsize=(9, 2.6 * len(pictures)), sharex=True)
    for axis, (title, feats) in zip(axes, pictures):
        middle = feats[:, 3 * 80 : 4 * 80].T  # the middle of the 7 stacked frames
        axis.imshow(middle, origin="lower", aspect="auto", cmap="magma", vmin=0, vmax=float(pictures[0][1].max()),
                    extent=(0, 0.06 * len(feats), 0, 80))
        axis.set(title=title, ylabel="mel bin")
    axes[-1].set_xlabel("seconds")
    path = Path(f"{Path(clip).stem}.show.png")
    save_figure(figure, path)
    print(path)


def merge(run_dir, model_pt, out):
    """Write a folder that funasr's AutoModel loads: the base's files, with what the run has changed in model.pt."""
    run_dir, base, out = Path(run_dir), Path(model_pt).parent, Path(out)
    if not (run_dir / "config.json").is_file():
        raise ValueError(f"{run_dir}: no config.json; give the output_dir of a finished run")
    run, trained = json.loads((run_dir / "config.json").read_text()), model.read_weights(run_dir / "trained.pt")
    if not run["base"]:
        raise ValueError(f"{run_dir}: was not trained on a Fun-ASR-Nano model.pt, so there is nothing to merge into")
    weights = dict(model.read_nano_weights(model_pt))
    if (found := model.hash_tensors(weights)) != run["base_hash"]:
        raise ValueError(f"{model_pt}: hash {found}, but {run_dir} was trained on {run['base_hash']}")
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty; give another folder")
    embed, head, changed = "llm.model.embed_tokens.weight", "llm.lm_head.weight", 0
    tied = embed in weights and torch.equal(weights[embed], weights.get(head, weights[embed]))
    for name, value in trained.items():
        if ".lora_B." in name:
            continue
        if ".lora_A." in name:  # W + alpha / r * B A, in the base's own dtype
            target = f"{name.split('.lora_A.')[0]}.weight"
            scale = run["lora"]["alpha"] / run["lora"]["r"]
            delta = scale * trained[name.replace(".lora_A.", ".lora_B.")] @ value
            weights[target] = (weights[target].float() + delta).to(weights[target].dtype)
        else:
            weights[name] = value  # fp32: bf16 would round small updates away
        changed += 1
    if tied and embed in trained:
        weights[head] = weights[embed]
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted(base.rglob("*")):
        if path.is_file() and path != Path(model_pt) and ".git" not in path.parts:
            (out / path.relative_to(base)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, out / path.relative_to(base))
    if run["conf"]["frontend_conf"]["fs"] == 8000 and run["conf"]["frontend_conf"]["mel_axis"] == "native":
        config = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
        config["frontend_conf"]["fs"] = 8000
        (out / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        print("frontend_conf.fs is 8000 in the merged config.yaml: the run was trained on FunASR's warped mel axis")
    elif run["conf"]["frontend_conf"]["fs"] == 8000:
        print("frontend_conf.fs stays as it is in the merged config.yaml: funasr has no pretrained mel axis at 8 kHz, "
              "so it resamples calls to 16 kHz; infer.py reads them natively, from the run folder")
    write_atomic(out / "model.pt", lambda file: torch.save({k: v.clone() for k, v in weights.items()}, file))
    print(f"{changed} of {len(weights)} tensors changed -> {out}")


def check(cfg):
    """--check: print the checklist and every key that changes nothing; exit status 1 where a line fails."""
    try:
        cfg = finish_config(cfg)
        found, _, _ = checklist(cfg, pick_device(cfg | {"dtype": "fp32"})[0])
    except ValueError as error:
        found = [(False, "configuration", [" ".join(str(error).split())])]
    print_checklist(found, cfg, verbose=True)
    if not all(ok for ok, _, _ in found):
        sys.exit(1)


def command_line(arguments):
    """Which of the five uses of this script is meant: a function of the configuration, and load_config's arguments."""
    if arguments[:1] == ["merge"]:
        if len(arguments) != 5 or arguments[3] != "-o":
            raise ValueError("merge RUN_DIR MODEL.pt -o FOLDER")
        return lambda cfg: merge(arguments[1], arguments[2], arguments[4]), []
    if "--compare" in arguments:
        paths = [argument for argument in arguments if argument != "--compare"]
        if not paths:
            raise ValueError("--compare needs YAML files")
        return lambda cfg: print(compare(paths)), []
    if "--show" in arguments:
        place = arguments.index("--show")
        clip, rest = arguments[place + 1], arguments[:place] + arguments[place + 2 :]
        return lambda cfg: show(clip, cfg), expand_arguments(rest)
    if "--check" in arguments:
        return check, expand_arguments([argument for argument in arguments if argument != "--check"])
    return main, expand_arguments(arguments)


def run_command():
    try:
        command, sys.argv[1:] = command_line(sys.argv[1:])
    except (ValueError, OSError, IndexError, yaml.YAMLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    run_main(command, DEFAULTS, __doc__)


if __name__ == "__main__":
    run_command()
