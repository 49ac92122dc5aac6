"""SteerMoE: steer a frozen speech encoder, layer by layer, until a frozen LLM can read it.

    python train_steermoe.py configs/steermoe/layer_wise_whisper_qwen7b_libri_train.yaml
    python train_steermoe.py configs/steermoe/layer_wise_whisper_qwen7b_libri_test.yaml
    torchrun --nproc_per_node 4 train_steermoe.py CONFIG.yaml [key=value ...]
    python train_steermoe.py CONFIG.yaml resume=true                   # goes on, to the bit
    deepspeed --num_gpus 4 train_steermoe.py --config CONFIG.yaml \\
        --deepspeed_config configs/stage2_simple.json

Model   after every encoder layer l: h + s_l * softmax(router_l(h)) @ V_l; then pooling and one
        Linear. Only V, router, s and Linear train: 5.2 M for Whisper-large-v3 and Qwen2.5-7B.
        steering: null is the linear ablation, adaptor=stack the SLAM-ASR bridge, a strong baseline.
Loss    cross-entropy of the text and its end-of-turn token, summed over the label tokens of the
        step, of all processes, and divided by their number.
            inputs  [system, user: prompt | speech | assistant: | text, end of turn]
            labels  [-100                 | -100   | -100       | text, end of turn]

Input   parquet_dirs, eval_dirs: folders of Parquet files or of save_to_disk, or manifests
Output  training.output_dir/steermoe.pt, config.json   what trains, as a plain state dict, best on
        eval_dirs, and all else that infer.py needs; last.pt to resume; metrics.jsonl, TensorBoard
        events, steering.jsonl, plots/*.png; dropped.jsonl, clips left out and why.
        mode=test: test.jsonl, test.json beside them
Papers  SteerMoE arXiv:2510.13558, SLAM-ASR arXiv:2402.08846. What differs from SteerMoE's code,
        and what its guide leaves open: docs/steermoe.md
Logged  ce (nats per label token), acc (share of label tokens predicted right, teacher-forced),
        eval_ce, eval_acc, wer, cer and wer_raw, cer_raw (as written), error_rate (WER, CER for
        Chinese; task=qa: 1 - exact_match), capped (answers cut at tokens_per_s), eval_dropped,
        lr_*, grad_norm and grad_norm_steering (means, before clipping), scale (of fp16's loss),
        positions (of the LLM, per step), audio_s_per_s. steering.jsonl, for each layer: scale, norm
        of each V_e, mean gate of each expert, entropy of the gates (nats), top (share of frames
        whose highest gate is that of the layer's favourite)
"""

import bisect
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import model

DEFAULTS = """
mode: train              # train, or test: score output_dir/steermoe.pt on all of parquet_dirs
task: asr                # asr, or qa: a clip's question follows the prompt; scored by exact match
whisper_encoder:
  model_path: ""         # hub name or folder; this one or conformer_encoder.model_path
  feature_dim: 0         # this and num_layers are checked against the model; 0: unchecked
  num_layers: 0
conformer_encoder:       # Parakeet or SenseVoice
  model_path: ""
  feature_dim: 0
  num_layers: 0
llm_decoder:
  model_name: ???
  max_length: 512        # most LLM positions of a training clip: prompt, speech and text
  use_cache: true        # decoding keeps a key-value cache, with false too
steering:                # `steering: null`: none, the linear ablation
  num_experts: 8
  steering_scale: 0.1
  use_layer_scales: true # false: all scales stay steering_scale
  use_gradient_clipping: true
  steering_gradient_clip: 1.0   # of the norm of V, router and scales together
training:
  output_dir: ???
  logging_dir: ""        # of TensorBoard; empty: output_dir
  batch_size: 4          # clips, per process
  epochs: 10
  learning_rate: 1e-4    # of the projection; all rates are peaks
  steering_learning_rate: 1e-2  # of V
  router_learning_rate: 1e-3    # of router and layer scales
  weight_decay: 0.01     # on the matrices of router and projection
  warmup_steps: 1000     # then cosine to 0
  gradient_clipping: 1.0 # of the norm of all gradients; 0: off
  fp16: true             # half precision; bf16 for Qwen, which overflows in fp16
  use_deepspeed: true    # where deepspeed_config is given; else PyTorch's DDP
  gradient_checkpointing: false # compute layers twice: less memory, a third slower
parquet_dirs: ???        # data sets: Parquet, save_to_disk, manifests
eval_dirs: []            # empty: no evaluation, steermoe.pt is the last
audio_column: audio      # of Parquet and save_to_disk; manifests have names of their own
text_column: text
question_column: question
sample_rate: 16000       # of the encoder, checked; audio of any rate is resampled
max_audio_length: 30.0   # seconds
max_text_length: 448     # tokens
filter_dataset: true     # leave training clips out that are over one of the three limits
normalize_text: true     # train on lower case without punctuation
textual_prompt: "please transcribe the audio content into text: "
system_prompt: null      # null: the chat template's own; "": an empty one
adaptor: linear          # linear, or stack: stack_frames frames -> Linear -> GELU -> Linear
stack_frames: 5
stack_hidden: 2048
max_prompt_tokens: 2048  # speech positions; what is longer is cut
use_adapter: true        # false: no projection, for an LLM as wide as the encoder
pooling_kernel_size: 4   # frames; 1: no pooling
pooling_position: 0      # behind the last layer: 0, or its number
pooling_type: avg        # avg or max
pad_to_30s: false        # Whisper: pad clips as in its training, at up to 10 times the cost
max_steps: 0             # > 0: exactly so many, whatever epochs says
logging_steps: 100       # 0: at the end only, as of the next two
eval_steps: 1000
save_steps: 1000
save_total_limit: 2      # copies step-N.pt of last.pt that are kept; 0: last.pt alone
eval_batch_size: 16
eval_clips: 500          # of eval_dirs that are scored and decoded, spread over it; 0: all
tokens_per_s: 12.0       # most tokens that an answer has per second of its clip
log_steering_analysis: true    # steering.jsonl and plots
steering_log_interval: 100
clip_steering_gradients: true  # false, or steering.use_gradient_clipping: no clip of its own
use_early_stopping: true       # where eval_dirs is given
early_stopping_patience: 3     # evaluations without a better one
max_dropped: 100         # stop when more clips than this cannot be read
deepspeed_config: ""     # also --deepspeed_config FILE
cache_dir: ""            # of tokens and durations; empty: beside output_dir
workers: 2               # processes that read audio and compute features
resume: false
seed: 0
device: auto
"""
SPELLINGS = {  # of the guide, beside ours
    "fp16": "training.fp16",
    "steering.steering_learning_rate": "training.steering_learning_rate",
    "steering.router_learning_rate": "training.router_learning_rate",
}
SETTINGS = (  # what decides what the weights mean: the same in training and use
    "task", "normalize_text", "textual_prompt", "system_prompt", "adaptor", "stack_frames",
    "stack_hidden", "max_prompt_tokens", "use_adapter", "pooling_kernel_size", "pooling_type",
    "pad_to_30s",
)  # fmt: skip


# ---- data -------------------------------------------------------------------

TEXTS = ("key", "where", "target", "language", "prompt", "hotwords", "question")


def list_clips(specs, cfg, tokenizer):
    """Data sets -> (manifests, with their audio; a table with a row for each of their rows).

    Columns TEXTS, ids, seconds by the header, reason (why it cannot be read, or ""). Made once for
    each data set and kept in cache_dir: process 0 makes it, the others find it.
    """
    import datasets

    kinds = {name: datasets.Value("string") for name in (*TEXTS, "reason")}
    kinds |= {"ids": datasets.List(datasets.Value("int32")), "seconds": datasets.Value("float64")}
    made_of = [cfg.normalize_text, sorted(kinds), tokenizer.backend_tokenizer.to_str()]
    folder = Path(cfg.cache_dir or Path(cfg.training.output_dir).parent / "manifests")
    folder.mkdir(parents=True, exist_ok=True)

    def measure(rows):
        found = {name: rows.get(name) or [None] * len(rows["where"]) for name in TEXTS}
        found["target"] = [text or "" for text in rows["target"]]
        texts = [model.normalize_text(t) if cfg.normalize_text else t for t in found["target"]]
        found["ids"] = model.text_to_ids(tokenizer, [text.strip() for text in texts])
        headers = [read_header(source) for source in rows.get("audio", rows.get("source"))]
        return found | dict(zip(("seconds", "reason"), zip(*headers, strict=True), strict=True))

    rank, manifests, parts = dist.get_rank() if dist.is_initialized() else 0, [], []
    if dist.is_initialized():  # a first look at a corpus takes longer than a step may
        group = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
        if rank > 0:
            dist.barrier(group)
    for spec in model.as_list(specs):
        rows = model.read_manifest(
            spec, folder, (cfg.audio_column, cfg.text_column, cfg.question_column)
        )
        mark = model.hash_text([rows._fingerprint, made_of])
        clips = rows.map(
            measure, batched=True, batch_size=64, remove_columns=rows.column_names,
            features=datasets.Features(kinds), new_fingerprint=mark,
            cache_file_name=str(folder / f"clips-{mark}.arrow"),
        )  # fmt: skip
        if cfg.task == "qa" and (missing := clips.data.column("question").null_count):
            raise model.UserError(f"{spec}: {missing} clips have no question; task=qa needs them")
        manifests.append(rows)
        parts.append(clips)
    if rank == 0 and dist.is_initialized():
        dist.barrier(group)
    return manifests, datasets.concatenate_datasets(parts)


def read_header(source):
    """(seconds, why it cannot be read) of a path, or of what a data set's audio column holds."""
    try:
        return model.audio_seconds(source), ""
    except model.AudioError as error:
        return 0.0, str(error)


@dataclass
class Batch:
    feats: torch.Tensor  # (B, T, F), zeros where padded
    lens: torch.Tensor  # (B,)
    rows: list  # of the table of clips; ids are empty where the audio cannot be read
    dropped: dict  # {key: reason} of those
    epoch: int
    used: int  # groups of the epoch that are then behind us

    def __post_init__(self):  # label tokens: of each text, and its end of turn
        self.labels = sum(len(row["ids"]) + 1 for row in self.rows if row["ids"])

    def pin_memory(self):
        self.feats = self.feats.pin_memory()
        return self


class Clips(torch.utils.data.Dataset):
    """(epoch, number, group of model.length_batches) -> Batch of this process."""

    def __init__(self, manifests, clips, encoder, rank=0):
        self.manifests, self.clips, self.encoder, self.rank = manifests, clips, encoder, rank
        self.ends = list(itertools.accumulate(map(len, manifests)))

    def __getitem__(self, place):
        epoch, number, group = place
        rows = [self.clips[n] for n in group[self.rank]]
        feats, dropped, rate = [], {}, self.encoder.sample_rate
        for n, row in zip(group[self.rank], rows, strict=True):
            part = bisect.bisect(self.ends, n)
            source = self.manifests[part][n - self.ends[part]]  # counted from its end
            try:
                wave = model.load_audio(source.get("audio", source.get("source")), rate)
                feats.append(self.encoder.features(wave, row["key"]))
            except model.AudioError as error:  # silence: every process has a batch in each step
                feats.append(self.encoder.features(torch.zeros(rate)))
                row["ids"], dropped[row["key"]] = [], f"{row['where']}: {error}"
        lens = torch.tensor([len(x) for x in feats])
        feats = pad_sequence(feats, batch_first=True)
        return Batch(feats, lens, rows, dropped, epoch, number + 1)


def select_clips(pipeline, clips, cfg):
    """Which clips are trained on.

    Output  their numbers, their LLM positions; {key: reason} of those that are over a limit, and of
            those that cannot be read.
    """
    rows, encoder = clips.to_list(), pipeline.encoder
    samples = [round(row["seconds"] * encoder.sample_rate) for row in rows]
    speech = pipeline.trained.out_lens(np.array([encoder.num_frames(n) for n in samples]))
    speech = np.minimum(speech, cfg.max_prompt_tokens).tolist()
    limits = "max_audio_length", "max_text_length", "llm_decoder.max_length"
    limits = {key: OmegaConf.select(cfg, key) for key in limits}
    kept, positions, filtered, dropped = [], [], {}, {}
    for n, row in enumerate(rows):
        texts, count = (*pipeline.prompt(row), row["ids"]), len(row["ids"])
        size = speech[n] + sum(map(len, texts)) + 1
        found = zip(limits, (row["seconds"], count, size), strict=True)
        over = [f"{value:g} is over {key}" for key, value in found if value > limits[key]]
        if row["reason"]:
            dropped[row["key"]] = f"{row['where']}: {row['reason']}"
        elif not count or over and cfg.filter_dataset:
            filtered[row["key"]] = over[0] if over else "empty text"
        else:
            kept.append(n)
            positions.append(size)
    if not kept:
        last = [*filtered.values(), *dropped.values()][-1]
        raise model.UserError(f"parquet_dirs: no clip is left to train on; the last: {last}")
    return np.array(kept), np.array(positions), filtered, dropped


# ---- steering ---------------------------------------------------------------


class Steering(nn.Module):
    """Vectors for every layer of a frozen encoder, mixed frame by frame by a softmax router.

        h <- h + s_l * softmax(h @ R_l^T + b_l) @ V_l        after layer l = 0 .. L - 1

    Input   layer l; h (B, T, D), its output.  Output  h, same shape and dtype; with V = 0 the same.
    seen    None, or a list that gets the gates (B, T, E) of each layer.
    Source  SteerMoE (arXiv:2510.13558), with its initial values. Gates are dense: no top-k, no
            balancing loss. Its one Linear(D, L * E) scores the experts of all layers at each layer
            and keeps a slice; here only the slice is computed, to the same numbers.
    """

    def __init__(self, num_layers, num_experts, width, scale=0.1, train_scales=True):
        super().__init__()
        shape, bound = (num_layers, num_experts), width**-0.5  # as nn.Linear(D, L * E) starts
        self.vectors = nn.Parameter(0.01 * torch.randn(*shape, width))  # V (L, E, D)
        self.router = nn.Parameter(torch.empty(*shape, width).uniform_(-bound, bound))
        self.router_bias = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.scales = nn.Parameter(torch.full((num_layers,), float(scale)), train_scales)
        self.seen = None

    def forward(self, layer, h):
        gates = F.linear(h, self.router[layer], self.router_bias[layer]).float().softmax(-1)
        if self.seen is not None:
            self.seen.append(gates.detach())  # (B, T, E)
        update = gates.to(h.dtype) @ self.vectors[layer].to(h.dtype)  # (B, T, D)
        return h + (self.scales[layer] * update).to(h.dtype)


def pool_frames(x, lens, kernel, kind):
    """Average or maximum ("avg", "max") of each `kernel` neighbouring frames, real ones only.

    Input   x (B, T, D), lens (B,).
    Output  (B, S, D), S = ceil(T / kernel), zeros where no frame is real; lens (B,).
    """
    real, missing = model.length_mask(lens, x.shape[1], x.device), -x.shape[1] % kernel
    x = F.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, kernel))  # (B, S, kernel, D)
    real = F.pad(real, (0, missing)).unflatten(1, (-1, kernel))[..., None]  # (B, S, kernel, 1)
    if kind == "avg":
        pooled = x.masked_fill(~real, 0.0).sum(2) / real.sum(2).clamp(min=1)
    else:
        pooled = x.masked_fill(~real, -math.inf).amax(2).masked_fill(~real.any(2), 0.0)
    return pooled.to(x.dtype), -(-lens // kernel)


class SteerMoE(nn.Module):
    """All that trains: steering, hooked into the encoder, and the bridge from frames to the LLM.

    Input   enc (B, T, D), lens (B,) of the encoder that it was made with.
    Output  emb (B, S, H), lens (B,), S <= max_prompt_tokens.
    """

    def __init__(self, encoder, llm_width, settings, embedding_rms=1.0):
        super().__init__()
        self.settings, width = settings, encoder.width
        self.stack = settings.stack_frames if settings.adaptor == "stack" else 1
        if settings.adaptor == "stack":
            sizes = settings.stack_hidden, 0, 1, 0.0, self.stack
            rest = {"embedding_rms": embedding_rms}
            self.bridge = model.AudioAdaptor(width, llm_width, *sizes, **rest)
        elif settings.use_adapter:
            self.bridge = nn.Linear(width, llm_width)
            # frames of about unit variance then start as loud as the LLM's embeddings
            self.bridge.weight.data.mul_(3**0.5 * embedding_rms)
            self.bridge.bias.data.mul_(embedding_rms)
        elif width == llm_width:
            self.bridge = nn.Identity()
        else:
            widths = f"the encoder is {width} wide, the LLM {llm_width}"
            raise model.UserError(f"use_adapter=false: {widths}")
        self.steering, own = None, settings.steering
        if own is not None:  # behind the bridge, which so starts alike without steering
            sizes = len(encoder.layers), own.num_experts, width
            self.steering = Steering(*sizes, own.steering_scale, own.use_layer_scales)
            for number, layer in enumerate(encoder.layers):  # by hooks: the encoder stays as it is
                layer.register_forward_hook(lambda _, args, h, n=number: self.steering(n, h))

    def out_lens(self, lens):
        """Encoder frames -> LLM positions, before the cut to max_prompt_tokens."""
        return -(-lens // self.settings.pooling_kernel_size + self.stack - 1) // self.stack

    def forward(self, enc, lens):
        most, kernel = self.settings.max_prompt_tokens, self.settings.pooling_kernel_size
        enc, lens = pool_frames(enc, lens, kernel, self.settings.pooling_type)
        if self.settings.adaptor == "stack":
            emb, lens = self.bridge(enc, lens)
        else:
            emb = self.bridge(enc)  # (B, S, H)
        return emb[:, :most], lens.clamp(max=most)


# ---- model and loss ---------------------------------------------------------


class Pipeline(nn.Module):
    """Encoder, what trains, and LLM in one module, so that DDP wraps one forward pass."""

    def __init__(self, encoder, trained, llm, tokenizer, settings):
        super().__init__()
        self.__dict__["encoder"] = encoder  # past nn.Module: frozen, and whole in every process
        self.trained, self.llm, self.tokenizer = trained, llm, tokenizer
        self.settings, self.stop_id = settings, model.end_of_turn(tokenizer)
        self.identity = {"encoder": encoder.identity, "llm": llm.identity}
        self.identity["settings"] = OmegaConf.to_container(settings)

    def prompt(self, row):
        """Token ids before and after the speech of a clip; its own prompt goes before ours."""
        text = row.get("prompt") or self.settings.textual_prompt
        text += row["question"] if self.settings.task == "qa" else ""
        rest = row.get("language"), row.get("hotwords"), self.settings.system_prompt
        return model.build_prompt(self.tokenizer, text, *rest)

    def splice(self, feats, batch, targets=None, pad_left=False):
        speech = self.trained(*self.encoder(feats, batch.lens))  # (B, S, H), (B,)
        embed, prompts = self.llm.get_input_embeddings(), map(self.prompt, batch.rows)
        return model.splice(embed, list(prompts), *speech, targets, pad_left)

    def forward(self, feats, batch):
        """Sums over the batch: CE (nats), right tokens, LLM positions. No ids: no label."""
        targets = [[*row["ids"], self.stop_id] if row["ids"] else [] for row in batch.rows]
        spliced = self.splice(feats, batch, targets)
        ce, _, right = model.transcript_loss(self.llm, spliced)
        return {"ce": ce, "right": right, "positions": spliced.labels.numel()}


def model_settings(cfg):
    """The part of a configuration that decides what the weights mean."""
    settings = {key: cfg[key] for key in SETTINGS} | {"steering": None}
    if cfg.steering is not None:
        names = "num_experts", "steering_scale", "use_layer_scales"
        settings["steering"] = {name: cfg.steering[name] for name in names}
    return OmegaConf.create(settings)


def build(settings, encoder_name, llm_name, dtype, device, llm_device):
    encoder = model.load_encoder(encoder_name, pad_to_30s=settings.pad_to_30s)
    encoder = model.freeze(encoder).to(device)
    llm, tokenizer = model.load_llm(llm_name, dtype, llm_device)
    table = llm.get_input_embeddings().weight
    trained = SteerMoE(encoder, table.shape[1], settings, model.embedding_rms(table)).to(device)
    return Pipeline(encoder, trained, llm, tokenizer, settings)


def load_trained(pipeline, folder):
    """Weights of a training into a pipeline of the same models and settings."""
    path = folder / "config.json"
    if not path.is_file():
        raise model.UserError(f"{folder}: no config.json; it has to be a training's output_dir")
    found = json.loads(path.read_text(encoding="utf-8"))
    model.check_identity(found, pipeline.identity, folder)
    path = folder / "steermoe.pt"
    model.load_weights(pipeline.trained, model.read_weights(path), path)


def load_listener(folder, cfg, device, dtype):
    """What infer.py hears with; see infer.load_listener."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("format") != model.FORMAT:
        raise model.UserError(f"{folder}: made by an earlier layout; train it again")
    names = [cfg[part].name or config[part]["name"] for part in ("encoder", "llm")]
    pipeline = build(OmegaConf.create(config["settings"]), *names, dtype, device, device)
    load_trained(pipeline, folder)
    model.freeze(pipeline.trained)
    own = {name: cfg[name] for name in ("prompt", "language", "hotwords") if cfg[name]}

    def hear(feats, lens):
        speech, lens = pipeline.trained(*pipeline.encoder(feats, lens))
        return model.Heard(speech, lens, lens), None

    return SimpleNamespace(
        encoder=pipeline.encoder, hear=hear, prompt=lambda row: pipeline.prompt(row | own),
        llm=pipeline.llm, tokenizer=pipeline.tokenizer, stop_id=pipeline.stop_id,
        ctc=None, read_ctc=None, spell=None, blank=None, position_s=None,
        about=f"SteerMoE {folder}, encoder {names[0]}, LLM {names[1]}",
    )  # fmt: skip


# ---- optimizer --------------------------------------------------------------


def parameter_groups(trained, training):
    """A group for each learning rate, with weight decay (on matrices) or without.

    Scales train at the router's rate: at 1e-2 Adam would move 0.1 by 10 % a step.
    """
    peaks = {"steering": training.steering_learning_rate, "router": training.router_learning_rate}
    peaks["projection"], groups = training.learning_rate, {}
    for name, parameter in trained.named_parameters():
        kind = "projection" if name.startswith("bridge.") else "router"
        kind = "steering" if name == "steering.vectors" else kind
        decay = name == "steering.router" or kind == "projection" and parameter.ndim > 1
        group = {"kind": kind, "peak": peaks[kind], "params": []}
        group["weight_decay"] = training.weight_decay if decay else 0.0
        if parameter.requires_grad:
            groups.setdefault((kind, decay), group)["params"].append(parameter)
    if not groups:
        raise model.UserError("nothing trains: give steering, or use_adapter=true")
    return list(groups.values())


def learning_rate(step, total, warmup_steps):
    """Share of the peak: linear warm-up, then cosine to 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def take_step(loss, trained, optimizer, scaler, engine, cfg):
    """Backward pass, clipping of steering, then of all, step. Output: norms before clipping."""
    if engine:
        engine.backward(loss)
        engine.step()  # clips all gradients together
        return {"grad_norm": engine.get_global_grad_norm() or 0.0}
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # the norm of real gradients is clipped, not of scaled ones
    norms = {}
    if trained.steering is not None:
        clips = cfg.clip_steering_gradients and cfg.steering.use_gradient_clipping
        limit = cfg.steering.steering_gradient_clip if clips else 0.0
        norm = nn.utils.clip_grad_norm_(trained.steering.parameters(), limit or math.inf)
        norms["grad_norm_steering"] = norm
    limit = cfg.training.gradient_clipping or math.inf
    norms["grad_norm"] = nn.utils.clip_grad_norm_(trained.parameters(), limit)
    scaler.step(optimizer)  # fp16: a step that overflows is left out
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return {name: norm.nan_to_num(0.0, 0.0) if scaler.is_enabled() else norm for name, norm in norms.items()}


def recompute(layer):
    """Compute a frozen layer again in the backward pass; transformers' own way is off in eval."""
    forward, how = layer.forward, {"use_reentrant": False, "preserve_rng_state": False}

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **how, **kwargs)

    layer.forward = run


# ---- what the experts do ----------------------------------------------------


def gate_usage(steering, lens):
    """What the router did with the batch that `steering.seen` holds: a dict a layer."""
    gates = torch.stack(steering.seen).double().cpu()  # (L, B, T, E)
    lens = lens + gates.shape[2] - lens.max()  # SenseVoice's query frames stand in front
    gates = gates[:, model.length_mask(lens, gates.shape[2])]  # (L, real frames, E)
    favourite = F.one_hot(gates.argmax(-1), gates.shape[-1]).double().mean(1).amax(-1)
    columns = {
        "scale": steering.scales, "norms": steering.vectors.norm(dim=-1), "gates": gates.mean(1),
        "entropy": -torch.xlogy(gates, gates).sum(-1).mean(1), "top": favourite,
    }  # fmt: skip
    columns = {k: x.detach().double().cpu().round(decimals=6).tolist() for k, x in columns.items()}
    return [{"layer": n} | {k: x[n] for k, x in columns.items()} for n in range(len(gates))]


@torch.no_grad()
def plot_gates(pipeline, data, folder, device, amp):
    """plots/experts.png: mean gates of each layer; gates_N.png: gates of three clips over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steering, encoder = pipeline.trained.steering, pipeline.encoder
    batch = data[0, 0, [list(range(min(32, len(data.clips))))]]
    steering.seen, lens = [], encoder.out_lens(batch.lens)
    with amp:
        encoder(batch.feats.to(device), batch.lens)
    seen, layers = torch.stack(steering.seen).float().cpu(), gate_usage(steering, lens)
    steering.seen = None
    (folder / "plots").mkdir(exist_ok=True)
    figure, axis = plt.subplots(layout="constrained")
    picture = axis.imshow([layer["gates"] for layer in layers], aspect="auto")
    axis.set(xlabel="expert", ylabel="layer", title=f"mean gate over {len(lens)} clips")
    figure.colorbar(picture)
    figure.savefig(folder / "plots" / "experts.png")
    layer = int(seen.std(2).sum((1, 2)).argmax())  # where gates move most
    for n, row in enumerate(batch.rows[:3]):
        frames = int(lens[n])
        figure, axis = plt.subplots(layout="constrained")
        gates = seen[layer, n, -int(lens.max()) :][:frames]  # behind any query frames
        axis.plot(np.arange(frames) * encoder.frame_ms / 1000, gates)
        axis.set(xlabel="seconds", ylabel=f"gates of layer {layer}", title=row["target"][:70])
        figure.savefig(folder / "plots" / f"gates_{n}.png")
    plt.close("all")


# ---- evaluation -------------------------------------------------------------


@torch.no_grad()
def evaluate(pipeline, data, count, cfg, device, amp, rank, world):
    """Scores over `count` clips of a data set, spread over it, and a line for each of them.

    A clip that cannot be read counts as an empty answer: no set gets easier by being broken.
    """
    pipeline.eval()
    chosen = np.unique(np.linspace(0, len(data.clips) - 1, count).astype(int))
    order = np.asarray(data.clips["seconds"])[chosen].argsort()[rank::world]  # little padding
    batches = np.array_split(chosen[order], max(1, -(-len(order) // cfg.eval_batch_size)))
    batches = [batch.tolist() for batch in batches]
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, sampler=[(0, 0, [batch]) for batch in batches if batch],
        num_workers=cfg.workers, multiprocessing_context="fork" if cfg.workers else None,
    )  # fmt: skip
    sums, lines = Counter(), {}
    for numbers, batch in zip(batches, loader, strict=False):
        feats = batch.feats.to(device)
        with amp:
            losses = pipeline(feats, batch)
            spliced = pipeline.splice(feats, batch, pad_left=True)
            caps = [model.token_cap(row["seconds"], cfg.tokens_per_s) for row in batch.rows]
            answers = model.greedy_decode(pipeline.llm, spliced, pipeline.stop_id, caps)
        sums.update(ce=float(losses["ce"]), right=int(losses["right"]), labels=batch.labels)
        sums.update(capped=sum(len(a) >= cap for a, cap in zip(answers, caps, strict=True)))
        texts = pipeline.tokenizer.batch_decode(answers, skip_special_tokens=True)
        for n, row, text in zip(numbers, batch.rows, texts, strict=True):
            lines[n] = {"key": row["key"], "target": row["target"], "text": text.strip()}
            if reason := batch.dropped.get(row["key"]):
                lines[n] |= {"text": "", "reason": reason}
    parts = [(sums, lines)] * world
    if world > 1:
        dist.all_gather_object(parts, (sums, lines))
    pipeline.train()
    sums = sum((part for part, _ in parts), Counter())
    lines = [line for _, line in sorted(item for _, part in parts for item in part.items())]
    labels = max(1, sums["labels"])
    scores = {"eval_ce": sums["ce"] / labels, "eval_acc": sums["right"] / labels}
    scores |= {"capped": sums["capped"], "eval_dropped": sum("reason" in line for line in lines)}
    return scores | text_scores(lines, cfg.task), lines


def text_scores(lines, task):
    """WER and CER, raw and normalised, and the error rate that chooses the best weights."""
    targets, answers = ([line[name] for line in lines] for name in ("target", "text"))
    scores = {"error_rate": model.error_rate(targets, answers)["rate"]}
    for name, characters in (("wer", False), ("cer", True)):
        for ending, normalize in (("_raw", str), ("", model.normalize_text)):
            found = model.error_rate(targets, answers, normalize, characters)
            scores[name + ending] = found["rate"]
    if task == "qa":
        pairs = zip(map(model.normalize_text, targets), map(model.normalize_text, answers), strict=True)
        scores["exact_match"] = sum(said == heard for said, heard in pairs) / len(lines)
        scores["error_rate"] = 1 - scores["exact_match"]
    return scores


def test(pipeline, cfg, device, amp, rank, world):
    """mode=test: score the trained weights on all of parquet_dirs."""
    folder = Path(cfg.training.output_dir)
    load_trained(pipeline, folder)
    data = Clips(*list_clips(cfg.parquet_dirs, cfg, pipeline.tokenizer), pipeline.encoder)
    scores, lines = evaluate(pipeline, data, len(data.clips), cfg, device, amp, rank, world)
    summary = {"clips": len(lines), "hours": sum(data.clips["seconds"]) / 3600} | scores
    if rank == 0:
        model.save(folder / "test.jsonl", lines)
        model.save(folder / "test.json", summary | {"test": model.as_list(cfg.parquet_dirs)})
        print("  ".join(f"{name} {value:.4g}" for name, value in summary.items()))
    return summary


# ---- DeepSpeed --------------------------------------------------------------


def launcher_options(arguments):
    """`--deepspeed_config FILE` as a key; `--local_rank` goes: LOCAL_RANK says the same."""
    found = []
    for argument in arguments:
        if found and found[-1] == "--deepspeed_config":
            found[-1] = f"deepspeed_config={argument}"
        elif not argument.startswith("--local_rank"):
            found.append(argument)
    return [a.removeprefix("--") if a.startswith("--deepspeed_config=") else a for a in found]


def zero_settings(cfg):
    """DeepSpeed's settings, of its JSON file and of ours; None: DDP."""
    if not cfg.deepspeed_config or not cfg.training.use_deepspeed or cfg.mode == "test":
        return None
    try:
        import deepspeed  # noqa: F401

        settings = json.loads(Path(cfg.deepspeed_config).read_text(encoding="utf-8"))
    except (ImportError, OSError, ValueError) as error:
        raise model.UserError(f"deepspeed_config={cfg.deepspeed_config}: {error}") from error
    if "RANK" not in os.environ:
        raise model.UserError("deepspeed_config: start with `deepspeed --num_gpus N`, or torchrun")
    settings |= {"train_micro_batch_size_per_gpu": cfg.training.batch_size}
    settings |= {"gradient_clipping": cfg.training.gradient_clipping}
    return settings | {"bf16": {"enabled": cfg.training.fp16}, "gradient_accumulation_steps": 1}


def start_deepspeed(pipeline, optimizer, settings):
    import deepspeed

    if settings["zero_optimization"]["stage"] == 3:  # in pieces before it goes to the GPU
        deepspeed.zero.Init(module=pipeline.llm, config_dict_or_path=settings)
    return deepspeed.initialize(model=pipeline, optimizer=optimizer, config=settings)[0]


def trained_weights(pipeline, engine):
    """State dict of what trains, fp32; ZeRO-3 has it in pieces, which all processes gather."""
    if not engine:
        return pipeline.trained.state_dict()
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(pipeline.trained.parameters())):
        weights = pipeline.trained.state_dict()
        return {name: value.detach().float().clone() for name, value in weights.items()}


# ---- the run ----------------------------------------------------------------


def check(cfg):
    """What one key alone cannot show. Output: section of the encoder that is used."""
    allowed = {"mode": ("train", "test"), "task": ("asr", "qa"), "adaptor": ("linear", "stack")}
    for key, values in (allowed | {"pooling_type": ("avg", "max")}).items():
        model.one_of(values, cfg, key)
    model.at_least(1, cfg, "training.batch_size", "eval_batch_size", "pooling_kernel_size")
    model.at_least(1, cfg, "max_prompt_tokens", "stack_frames", "early_stopping_patience")
    model.at_least(0, cfg, "logging_steps", "eval_steps", "save_steps", "steering_log_interval")
    model.at_least(0, cfg, "training.gradient_clipping", "training.warmup_steps", "eval_clips")
    model.at_least(0, cfg, "save_total_limit", "max_dropped", "workers", "max_steps")
    if cfg.steering is not None:
        model.at_least(1, cfg, "steering.num_experts")
        model.at_least(0, cfg, "steering.steering_gradient_clip")
    given = [k for k in ("whisper_encoder", "conformer_encoder") if cfg[k].model_path]
    if len(given) != 1:
        raise model.UserError("give whisper_encoder.model_path or conformer_encoder.model_path")
    if not cfg.llm_decoder.use_cache:
        print("llm_decoder.use_cache=false: decoding keeps its cache; the text is the same")
    return given[0]


def check_encoder(encoder, cfg, section):
    """Keys that describe the encoder have to be true of it."""
    found = {f"{section}.feature_dim": encoder.width, f"{section}.num_layers": len(encoder.layers)}
    for key, value in (found | {"sample_rate": encoder.sample_rate}).items():
        if (given := OmegaConf.select(cfg, key)) not in (0, value):
            raise model.UserError(f"{key}={given}, but the encoder has {value}")
    if cfg.pooling_position not in (0, len(encoder.layers)):
        where = f"pooling_position={cfg.pooling_position}: 0 or {len(encoder.layers)}"
        raise model.UserError(f"{where}; no frozen layer has ever seen pooled frames")


def precision(cfg):
    """Dtype of the frozen LLM and of autocast; what trains is fp32 always."""
    if not cfg.training.fp16:
        return "fp32"
    path = model.find_model(cfg.llm_decoder.model_name) / "config.json"
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type", "")
    if not kind.startswith("qwen") and not cfg.deepspeed_config:
        return "fp16"
    print("training.fp16: bf16 is used; Qwen overflows in fp16, DeepSpeed needs no loss scale then")
    return "bf16"


def main(cfg):
    section = check(cfg)
    device, dtype, rank, world = model.start(cfg.device, precision(cfg))
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    folder, zero = Path(cfg.training.output_dir), zero_settings(cfg)
    torch.manual_seed(cfg.seed)
    names = cfg[section].model_path, cfg.llm_decoder.model_name
    # ZeRO-3 shares out an LLM that does not fit a GPU, so it starts on the CPU
    whole = not zero or zero["zero_optimization"]["stage"] < 3
    pipeline = build(model_settings(cfg), *names, dtype, device, device if whole else "cpu")
    encoder, trained = pipeline.encoder, pipeline.trained
    check_encoder(encoder, cfg, section)
    if cfg.mode == "test":
        return test(pipeline, cfg, device, amp, rank, world)
    state = model.open_run(folder, cfg, pipeline.identity, cfg.resume, rank, world)
    manifests, clips = list_clips(cfg.parquet_dirs, cfg, pipeline.tokenizer)
    kept, positions, filtered, dropped = select_clips(pipeline, clips, cfg)
    valid = None
    if cfg.eval_dirs:
        valid = Clips(*list_clips(cfg.eval_dirs, cfg, pipeline.tokenizer), encoder)

    for layer in (*encoder.layers, *pipeline.llm.model.layers):
        if cfg.training.gradient_checkpointing:
            recompute(layer)
    optimizer = torch.optim.AdamW(parameter_groups(trained, cfg.training), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, epoch, used, best, stale, spent = 0, 0, 0, [math.inf, math.inf], 0, 0.0
    if state:
        model.load_weights(trained, state["trained"], folder / "last.pt")
        step, epoch, used, best = (state[name] for name in ("step", "epoch", "used", "best"))
        stale, spent = state["stale"], state["spent"]
    engine = start_deepspeed(pipeline, optimizer, zero) if zero else None
    if state and engine:
        engine.load_checkpoint(str(folder / "deepspeed"), f"step-{step}", load_module_strict=False)
    elif state:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    wrapped = engine or pipeline
    if world > 1 and not engine:
        wrapped = nn.parallel.DistributedDataParallel(pipeline, broadcast_buffers=False)

    def groups_of(epoch):
        size = cfg.training.batch_size
        limits = (size * int(positions.max()), world, cfg.seed, epoch, size)
        groups = model.length_batches(positions, *limits)
        return [[kept[batch].tolist() for batch in group] for group in groups]

    total = cfg.max_steps or cfg.training.epochs * len(groups_of(0))
    train = Clips(manifests, clips, encoder, rank)
    loader = iter(torch.utils.data.DataLoader(
        train, batch_size=None, sampler=model.endless_groups(groups_of, epoch, used),
        num_workers=cfg.workers, multiprocessing_context="fork" if cfg.workers else None,
        pin_memory=device.type == "cuda",
    ))  # fmt: skip
    board = cfg.training.logging_dir or folder
    writer = SummaryWriter(board, purge_step=step + 1) if rank == 0 else None
    steering, patience = trained.steering, cfg.early_stopping_patience
    analysed = bool(steering and writer and not engine and cfg.log_steering_analysis)
    if rank == 0:
        model.save(folder / "dropped.jsonl", drop_rows(filtered | dropped))
        count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        hours = sum(np.asarray(clips["seconds"])[kept]) / 3600
        print(
            f"train {len(kept)} clips, {hours:.2f} h an epoch, {len(filtered)} over a limit, "
            f"{len(dropped)} not readable; eval {len(valid.clips) if valid else 0} | {total} steps "
            f"of {cfg.training.batch_size} clips x {world} | {count:,} trainable | encoder "
            f"{names[0]}, LLM {names[1]} | {device} {dtype}, torch {torch.__version__}", flush=True,
        )  # fmt: skip
    pipeline.train()
