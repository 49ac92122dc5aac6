"""SALM: an LLM that hears the recordings of a conversation, by the keys of NeMo's SpeechLM2.

    python train_salm.py configs/salm.yaml [key=value ...]      # +key=value, ++key=value, ~key too
    python train_salm.py --config-path configs --config-name salm --check    # all but the training
    torchrun --nproc_per_node 4 train_salm.py configs/salm.yaml [trainer.strategy=fsdp2]
    python infer.py configs/infer.yaml model.dir=RUN one.wav+two.wav prompt="What do both say?"

Model   recording -> encoder -> modality adapter -> projection -> its place in the chat -> LLM
            ids     [system, user: text, RECORDING, text | assistant: | answer, end of turn | ...]
            labels  [-100                                | -100       | answer, end of turn | -100]
Loss    ce_weight x cross-entropy of the assistant's turns and of the token that ends each
        + distill_weight x KL from the frozen LLM that reads the texts of the recordings to the one
          that hears them (as Ultravox), over the teacher's distill_top_k tokens and all the rest;
        both summed over the step of all processes and divided by its label tokens
Input   conversations, known by their rows: NeMo's (`conversations` of from, type, value; `text`
        beside an audio turn is what it says), ShareGPT (`sound`, and <sound> in a turn; `texts`),
        or any manifest: `prompt` and recording ask, `target` answers. The type spoken_requests of
        input_cfg is a manifest of questions: before training the LLM answers their `target` itself.
Output  exp_manager.explicit_log_dir: salm.pt, lora/ (a PEFT folder) and config.json for infer.py,
        best by checkpoint_callback_params; step=N.pt; last.pt to resume; answers.jsonl,
        dropped.jsonl; valid.jsonl, the latest answers; metrics.jsonl, TensorBoard events; control.*
Papers  SALM arXiv:2310.09424, Conformer arXiv:2005.08100, LoRA arXiv:2106.09685
Source  keys and shapes of NeMo's SALM. Departures: no header of a turn among the labels; the loss
        counts the tokens of all processes; trained weights are fp32 under bf16-true; a pattern of
        freeze_params that matches nothing is an error; frozen means eval. With templates that
        think (Qwen3) only the last answer looks as it does in generation.
Logged  ce (nats per label token), acc (share of them predicted right), kl (nats per label token),
        agree (teacher and student choose alike), lr, grad_norm, positions (of the LLM per step),
        audio_s_per_s, gpu_gib; of validation sets val_loss_NAME (ce), val_acc_NAME, val_kl_NAME,
        val_agree_NAME, val_wer_NAME (val_cer of Chinese) and val_exact_NAME of greedy answers, and
        their means val_loss ...; at the end the same with the recordings of other conversations,
        control.json and .jsonl: they ruin a model that listens.
"""

import contextlib
import functools
import inspect
import itertools
import json
import math
import os
import re
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
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.checkpoint import state_dict as whole
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import model

DEFAULTS = r"""
# A key marked + is not NeMo's, - changes nothing, = has only this value.
name: salm
model:
  pretrained_llm: ???        # folder or hub name of an instruct LLM
  pretrained_asr: ???        # whose encoder hears: Whisper, SenseVoice, Fun-ASR-Nano or Parakeet
  pretrained_weights: true   # false: random weights of the same architectures
  init_from: ""              # + run of train_phase2.py or of this script, to go on from
  audio_locator_tag: "<audio>"  # stands for a recording in a text; a mark, never a token
  prompt_format: ""          # - the LLM's own chat template is the format
  freeze_params:             # regular expressions, from the start of a name
    ['^llm\..+$', '^embed_tokens\..+$', '^perception\.encoder\..+$']
  prevent_freeze_params: []  # these train all the same, and LoRA
  lora:                      # null or r=0: none, or that of init_from
    {task_type: CAUSAL_LM, r: 0, lora_alpha: 8, lora_dropout: 0.0, target_modules: [q_proj, v_proj]}
  perception:
    target: nemo.collections.speechlm2.modules.perception.AudioPerceptionModule  # =
    output_dim: 0            # 0: the LLM's width, which it has to be
    speech: ""               # + frames, or ctc: soft speech of a CTC head, see train_phase2.py; "":
                             # as in init_from, else frames
    feature_noise: 0.0       # + of the encoder's frames in training, standard deviation
    preprocessor:
      normalize: NA          # - the encoder's own front end is used, as upstream does
    encoder:
      self_attention_model: ""     # "": unchecked; the encoder has its own
      att_context_size: [-1, -1]   # frames to the left and to the right of each; -1: all
      conv_context_size: null      # null: the encoder's own
      conv_norm_type: batch_norm   # - the encoder has its own; frozen, so are its statistics
    modality_adapter:              # without init_from
      _target_: nemo.collections.asr.modules.ConformerEncoder  # IdentityConnector, + AudioAdaptor
      feat_in: -1                  # the encoder's width, or -1
      <<: {feat_out: -1, n_layers: 2, d_model: 1024, n_heads: 8, ff_expansion_factor: 4}
      subsampling: stacking        # + the only one where subsampling_factor is over 1
      subsampling_factor: 1
      subsampling_conv_channels: 256  # - of a subsampling by convolution
      causal_downsampling: false      # - stacked frames see no other ones
      self_attention_model: rel_pos   # or abs_pos
      att_context_size: [-1, -1]
      att_context_style: regular      # or chunked_limited
      <<: {xscaling: true, untie_biases: true}
      pos_emb_max_len: 5000           # - positions are made for the length at hand
      conv_kernel_size: 9
      conv_norm_type: batch_norm      # or layer_norm
      conv_context_size: null         # null: both sides alike; causal, or two numbers
      <<: {dropout: 0.0, dropout_pre_encoder: 0.0, dropout_emb: 0.0, dropout_att: 0.0}
      adaptor:                        # + of AudioAdaptor
        {hidden_dim: 2048, num_layers: 2, num_heads: 8, stack: 1, pre_norm: true, dropout: 0.0}
  optimizer:
    _target_: torch.optim.AdamW       # =
    <<: {lr: 5.0e-4, betas: [0.9, 0.98], weight_decay: 1.0e-3}  # no decay of norms and biases
    foreach: true                     # - it is fused
  lr_scheduler:
    _target_: nemo.core.optim.lr_scheduler.CosineAnnealing  # =
    <<: {warmup_steps: 1000, min_lr: 1.0e-6, max_steps: "${trainer.max_steps}"}
loss:                        # +
  <<: {ce_weight: 1.0, distill_weight: 0.0, distill_top_k: 64}
  mask_header: true          # false: the header of the assistant's turns is learnt too, as in NeMo
trainer:
  devices: -1                # processes; -1: as many as torchrun has started
  num_nodes: 1
  accelerator: auto          # gpu, cpu or auto
  strategy: auto             # auto: DDP of several processes; fsdp2, of torchrun
  precision: bf16-true       # bf16-mixed is the same here; 32-true. A frozen LLM is bf16 on a GPU,
                             # what trains, and the encoder, are fp32 under autocast
  logger: false              # - metrics.jsonl and TensorBoard events are written
  enable_checkpointing: false    # - exp_manager's is used
  replace_sampler_ddp: false     # - batches are shared out in any case
  use_distributed_sampler: false # - batches are shared out in any case
  max_epochs: null           # the end is where the first of the two is reached
  max_steps: 100000          # -1: max_epochs alone
  limit_train_batches: 0     # > 0: so many batches are an epoch of val_check_interval
  num_sanity_val_steps: 0    # not 0: scores before the first step
  log_every_n_steps: 10
  val_check_interval: 2000.0 # batches; up to 1: share of an epoch
  accumulate_grad_batches: 1
  gradient_clip_val: 1.0     # of the gradient's norm; 0: off
exp_manager:
  explicit_log_dir: ""       # "": exp_dir/name/version
  <<: {exp_dir: runs, name: "${name}", version: ""}
  create_wandb_logger: false # =, `wandb sync RUN` uploads the TensorBoard events
  wandb_logger_kwargs: {}    # - see create_wandb_logger
  create_tensorboard_logger: true  # - events are always written
  <<: {resume_if_exists: true, resume_ignore_no_checkpoint: true}
  create_checkpoint_callback: true # false: last.pt alone is kept
  checkpoint_callback_params: {monitor: val_acc, filename: "{step}", save_top_k: 1, mode: max}
data:
  prompt: "Transcribe:"      # + of a manifest's rows without one
  system_prompt: null        # + null: the template's own
  answer_tokens: 64          # + of an answer to one of spoken_requests
  target_sample_rate: null   # - of the duplex models
  train_ds:
    sample_rate: 16000       # the encoder's, to which all audio is brought
    manifest_filepath: []    # conversations or manifests, commas between
    input_cfg: []            # [{type, manifest_filepath, tags: {context, system_prompt}}, ...]
    shar_path: ""
    seed: 42
    shard_seed: randomized   # - the order is a function of seed and epoch
    num_workers: 4
    batch_size: 16           # conversations
    batch_tokens: 0          # > 0: LLM positions of a batch, padding included
    batch_duration: 0.0      # > 0: seconds of a batch, padding included
    max_tokens: 4096         # longer conversations are left out
    token_equivalent_duration: 0.08     # - positions are counted by the encoder's own frames
    use_bucketing: true      # - conversations of like length share a batch
    num_buckets: 1           # - see use_bucketing, as for the next two
    <<: {bucket_buffer_size: 10000, bucket_duration_bins: []}  # - see use_bucketing
    use_multimodal_sampling: true       # - batch_tokens counts text and audio
    max_dropped: 100         # + stop when more conversations than this cannot be used
  validation_ds:
    datasets: {}             # NAME: {manifest_filepath or input_cfg}
    <<: {sample_rate: 16000, batch_size: 16, num_workers: 2}
    <<: {seed: 42, shard_seed: randomized}  # - every set is read as it stands
    decode_clips: 200        # + of each set, spread over it, that are scored; 0: all
    max_new_tokens: 128      # + of an answer
save_every: 500              # + steps between two last.pt
"""
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "system": "system"}  # fmt: skip
TYPES = ("multimodal_conversation", "share_gpt", "manifest", "spoken_requests")
NEMO = {  # NeMo's names -> Hugging Face's, or the width of those that transformers cannot load
    **{name: f"nvidia/{name}" for name in ("parakeet-ctc-0.6b", "parakeet-ctc-1.1b",
                                           "parakeet-tdt-0.6b-v2", "parakeet-tdt-0.6b-v3")},
    "canary-1b-flash": 1024, "canary-1b-v2": 1024,
    "stt_en_fastconformer_hybrid_large_streaming_80ms": 512,
    "stt_en_fastconformer_hybrid_large_streaming_multi": 512,
}  # fmt: skip


# ---- conversations ----------------------------------------------------------


def json_turns(row, tag, folder):
    """A row of NeMo's or ShareGPT's conversations -> turns [(role, text)], recordings [dict]."""
    turns, audio = [], []
    sounds = next((row[k] for k in ("sound", "speech", "ori_sound") if row.get(k)), [])
    sounds = [sounds] if isinstance(sounds, str) else list(sounds)
    for turn in row["conversations"]:
        role, text = ROLES.get(str(turn["from"]).lower()), turn["value"]
        if role is None:
            raise ValueError(f"role {turn['from']!r} is none of {', '.join(ROLES)}")
        if turn.get("type") == "audio":
            if role != "user":
                raise ValueError(f"a recording in a turn of the {role}; only the user has some")
            start, length = (turn.get(k) and float(turn[k]) for k in ("offset", "duration"))
            part = turn.get("offset") is not None and length
            clip = {"source": text, "text": turn.get("text"), "duration": length, "start": start}
            clip["channel"] = None if turn.get("channel") is None else str(turn["channel"])
            audio.append(clip | {"end": start + length if part else None})
            text = tag
        elif role == "user":
            text = re.sub("<(sound|speech)>", lambda _: tag, text)
        if turns and turns[-1][0] == role:
            turns[-1] = role, f"{turns[-1][1]} {text}"
        else:
            turns.append((role, text))
    places = sum(text.count(tag) for role, text in turns if role == "user") - len(audio)
    if len(sounds) > places == 1:  # several recordings behind one tag
        turns = [(r, t.replace(tag, tag * len(sounds)) if r == "user" else t) for r, t in turns]
    texts = row.get("texts") or [None] * len(sounds)
    sounds, texts = (x * places if len(x) == 1 < places else x for x in (sounds, texts))
    audio += [{"source": s, "text": t} for s, t in zip(sounds, texts, strict=True)]
    for clip in audio:
        clip["source"] = os.path.join(folder, clip["source"])
    return turns, audio


def holds_conversations(spec):
    lines = model.read_lines(spec) if Path(spec).is_file() else iter(())
    return '"conversations"' in next(lines, ("", ""))[1]


def list_conversations(spec, item, cfg, answers, cache_dir):
    """(key, where, turns, recordings) of a file or manifest; recordings as model.load_clip's rows,
    or their place in a manifest; `text`: what one says, as far as it is known."""
    tag, tags, asks = cfg.model.audio_locator_tag, item.get("tags") or {}, item["type"] == TYPES[3]
    system = tags.get("system_prompt") or cfg.data.system_prompt
    system = [] if system is None else [("system", system)]
    if holds_conversations(spec):
        for where, line in model.read_lines(spec):
            try:
                row = json.loads(line)
                turns, audio = json_turns(row, tag, os.path.dirname(spec))
                turns = turns if turns[0][0] == "system" else [*system, *turns]
                yield str(row.get("id") or row.get("key") or where), where, turns, audio
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                raise model.UserError(f"{where}: not a conversation ({error})") from error
        return
    rows = open_manifest(spec, cache_dir)
    for n, row in enumerate(rows.select_columns([*model.FIELDS])):
        prompt = row["prompt"] or tags.get("context") or ("" if asks else cfg.data.prompt)
        prompt = prompt.replace("{language}", row["language"] or "")
        answer = answers.get(request_id(row, item, cfg)) if asks else row["target"]
        prompt = prompt if tag in prompt else prompt + tag
        turns = [*system, ("user", prompt), ("assistant", answer)]
        told = row["target"] if asks or prompt == f"Transcribe:{tag}" else None
        yield row["key"], row["where"], turns, [{"manifest": spec, "row": n, "text": told}]


def render(tokenizer, turns, tag, mask_header=True, answer=False):
    """A conversation in the LLM's chat template: ids with model.AUDIO for each recording, labels.

    Labels stand on the assistant's texts and on the token that ends each. answer: the turn of the
    assistant begins at the end, to be written.
    """
    begin, end, messages = "\ue001", "\ue002", []  # around the assistant's texts; never tokenised
    for role, text in turns:
        parts = re.sub(f"[{begin}{end}]", "", text).split(tag if role == "user" else "\0")
        text = model.AUDIO_MARK.join(model.mark_special(tokenizer, part) for part in parts)
        text = f"{begin}{text.strip()}{end}" if role == "assistant" else text
        messages.append({"role": role, "content": text})
    rest = {"tokenize": False, "enable_thinking": False}
    write = functools.partial(tokenizer.apply_chat_template, **rest)
    pieces, headers = re.split(f"[{begin}{end}]", write(messages, add_generation_prompt=answer)), []
    if len(pieces) != 1 + 2 * sum(role == "assistant" for role, _ in turns):
        raise ValueError("it drops or repeats a part of an assistant's text (</think>?)")
    if not mask_header:  # as it stands before the last answer, and before others
        before = messages[:-1] or messages
        header = write(before, add_generation_prompt=True).removeprefix(write(before))
        headers = [header.strip(), header.partition("<think>")[0].strip()]
    ids, labels = [], []
    for n, piece in enumerate(pieces):
        for m, part in enumerate(piece.split(model.AUDIO_MARK)):
            own = [model.AUDIO] * bool(m) + model.turn_to_ids(tokenizer, part)
            says = len(own) * (n % 2) + (n > 0 and n % 2 == 0 and m == 0)  # all, or the end of turn
            ids += own
            labels += own[:says] + [model.IGNORE] * len(own[says:])
        for count in range(1, min(len(ids), 32) + 1) if headers and n % 2 == 0 else ():
            if tokenizer.decode([max(0, i) for i in ids[-count:]]).strip() in headers:
                labels[-count:] = ids[-count:]
                break
    return ids, labels


KINDS = {"key": "string", "where": "string", "target": "string", "audio": "string",
         "reason": "string", "seconds": "float64", "positions": "int64"}  # fmt: skip


def list_items(conf):
    """What a set is made of, as entries of input_cfg: {type, manifest_filepath, tags}."""
    items = model.as_list(conf.get("manifest_filepath", []))
    items = [{"type": "manifest", "manifest_filepath": path} for path in items]
    items += OmegaConf.to_container(OmegaConf.create(list(conf.get("input_cfg") or [])))
    for item in items:
        if set(item) - {"type", "manifest_filepath", "tags"} or "manifest_filepath" not in item:
            raise model.UserError(f"input_cfg: {item}: type, manifest_filepath and tags expected")
        if (given := item.get("type")) not in TYPES:
            raise model.UserError(f"input_cfg.type={given}: is none of {', '.join(TYPES)}")
    return items


def read_conversations(conf, cfg, tokenizer, perception, answers, cache_dir):
    """A memory-mapped Dataset of conversations: KINDS, and token ids as `render` makes them.

    `audio` is JSON: recordings with their texts; `asked`: ids that ask for the last answer;
    `reason`: why one cannot be used. Kept in cache_dir, made again when a file changes.
    """
    import datasets

    datasets.disable_progress_bars()
    kinds = {name: datasets.Value(kind) for name, kind in KINDS.items()}
    kinds |= dict.fromkeys(("ids", "labels", "asked"), datasets.List(datasets.Value("int32")))
    tag, header, encoder = cfg.model.audio_locator_tag, cfg.loss.mask_header, perception.encoder

    def make(item, spec):
        for key, where, turns, audio in list_conversations(spec, item, cfg, answers, cache_dir):
            places = sum(text.count(tag) for role, text in turns if role == "user")
            if places != len(audio):
                raise model.UserError(f"{where}: {places} x {tag} for {len(audio)} recordings")
            if turns[-1][0] != "assistant":
                raise model.UserError(f"{where}: ends with a turn of the {turns[-1][0]}, no answer")
            known, turns[-1] = turns[-1][1] is not None, ("assistant", turns[-1][1] or "")
            try:
                ids, labels = render(tokenizer, turns, tag, header)
                asked, _ = render(tokenizer, turns[:-1], tag, answer=True)
            except Exception as error:  # of the chat template's own rules
                raise model.UserError(f"{where}: the LLM's chat template says: {error}") from error
            row = {"key": key, "where": where, "target": turns[-1][1].strip()}
            row["reason"] = "" if known else "no answer"
            row |= {"ids": ids, "labels": labels, "asked": asked, "seconds": 0.0}
            row |= {"audio": json.dumps(audio), "positions": len(ids) - len(audio)}
            try:
                for clip in audio:
                    seconds = model.clip_seconds(clip_row(clip, cache_dir))
                    frames = encoder.num_frames(round(seconds * encoder.sample_rate))
                    row["seconds"] += seconds
                    row["positions"] += int(perception.out_lens(max(1, frames)))
            except model.AudioError as error:
                row["reason"] = str(error)
            yield row

    about = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, tag, header, KINDS]
    about += [cfg.data.prompt, cfg.data.system_prompt, perception.identity, sorted(answers.items())]
    about += [{key: value for key, value in encoder.identity.items() if key != "name"}]
    parts = []
    for item in list_items(conf):
        for spec in model.as_list(item["manifest_filepath"]):
            held = holds_conversations(spec) or open_manifest(spec, cache_dir)._fingerprint
            mark = model.hash_text([model.file_stamp(spec), held, item, about])
            given = {"fingerprint": mark, "gen_kwargs": {"item": item, "spec": spec}}
            try:
                kept = datasets.Features(kinds), str(cache_dir)
                parts.append(datasets.Dataset.from_generator(make, *kept, **given))
            except datasets.exceptions.DatasetGenerationError as error:
                raise error.__cause__ or error from None
    if not sum(map(len, parts)):
        raise model.UserError("no conversations: give manifest_filepath or input_cfg of each set")
    return datasets.concatenate_datasets(parts)


open_manifest = functools.cache(model.read_manifest)


def clip_row(clip, cache_dir):
    """A recording of a conversation as model.load_clip takes it."""
    if "manifest" in clip:
        return open_manifest(clip["manifest"], cache_dir)[clip["row"]]
    return {"key": clip["source"]} | clip


@dataclass
class Batch:
    feats: torch.Tensor  # (R, T, F) of all recordings; (0, 1, 1) where there are none
    lens: torch.Tensor  # (R,) on the CPU
    recordings: int  # R
    rows: list  # of read_conversations, with n labels (0 where one cannot be heard) and `told`
    epoch: int
    used: int  # groups of the epoch that are then behind us

    def pin_memory(self):
        self.feats = self.feats.pin_memory()
        return self

    def counts(self):
        """Label tokens, and those of rows whose recordings all have texts."""
        counts = [(row["n"], row["n"] * row["told"]) for row in self.rows]
        return [sum(column) for column in zip(*counts, strict=True)]


class Conversations(torch.utils.data.Dataset):
    """(epoch, number, group of model.length_batches) -> Batch of this process."""

    def __init__(self, rows, encoder, cache_dir, rank=0, swapped=None):
        self.rows, self.encoder, self.cache_dir, self.rank = rows, encoder, cache_dir, rank
        self.swapped = swapped or {}  # {row: recordings in place of its own}

    def __getitem__(self, place):
        epoch, number, group = place
        rows, feats, silence = [], [], torch.zeros(self.encoder.sample_rate)
        for n in map(int, group[self.rank]):
            row = self.rows[n]
            audio = json.loads(row["audio"])
            row |= {"told": all(clip.get("text") for clip in audio), "audio": audio}
            for clip in self.swapped.get(n, audio):
                own = clip_row(clip, self.cache_dir)
                try:
                    wave = model.load_clip(own, self.encoder.sample_rate)
                    feats.append(self.encoder.features(wave, own["key"]))
                except model.AudioError as error:
                    row |= {"reason": str(error), "labels": [model.IGNORE] * len(row["labels"])}
                    feats.append(self.encoder.features(silence))
            rows.append(row | {"n": sum(label != model.IGNORE for label in row["labels"])})
        lens, count = torch.tensor([len(x) for x in feats], dtype=torch.long), len(feats)
        feats = pad_sequence(feats, True) if feats else torch.zeros(0, 1, 1)
        return Batch(feats, lens, count, rows, epoch, number + 1)

    def load(self, places, workers, device):
        rest = {"num_workers": workers, "pin_memory": device.type == "cuda"}
        return torch.utils.data.DataLoader(self, batch_size=None, sampler=places, **rest)


def batch_groups(rows, conf, world, epoch):
    """model.length_batches by positions or seconds, of at most batch_size conversations."""
    lengths = np.asarray(rows["positions"])
    budget = conf.batch_tokens or int(lengths.max()) * conf.batch_size
    if conf.batch_duration and not conf.batch_tokens:
        lengths = np.ceil(100 * np.asarray(rows["seconds"])).astype(int) + 1
        budget = math.ceil(100 * conf.batch_duration)
    return model.length_batches(lengths, budget, world, conf.seed, epoch, conf.batch_size)


# ---- model and losses -------------------------------------------------------


class Perception(nn.Module):
    """Encoder, modality adapter and projection: feats (R, T, F), lens -> (R, S, D), lens (R,)."""

    def __init__(self, encoder, cfg, table, start):
        super().__init__()
        conf, wide, rms = cfg.model.perception, table.shape[1], model.embedding_rms(table)
        own = OmegaConf.to_container(conf.modality_adapter)
        kind, speech = own.pop("_target_").rpartition(".")[2], "frames"
        if "adaptor" in start:  # of train_phase2.py
            kind, own["adaptor"] = "AudioAdaptor", start["adaptor"]
            speech = start["settings"]["speech"]
        if "perception" in start:
            kind, own, speech = start["perception"].values()
        speech = conf.speech or speech
        self.identity = {"kind": kind, "settings": own, "speech": speech}
        self.encoder, self.proj, self.ctc, inner = encoder, nn.Identity(), None, encoder.width
        self.noise = conf.feature_noise
        relative = "rel_pos" if isinstance(encoder, model.ParakeetEncoder) else "abs_pos"
        for key, given, value, unset in (
            ("output_dim", conf.output_dim, wide, 0),
            ("modality_adapter.feat_in", conf.modality_adapter.feat_in, encoder.width, -1),
            ("encoder.self_attention_model", conf.encoder.self_attention_model, relative, ""),
        ):
            if given not in (value, unset):
                raise model.UserError(f"model.perception.{key}={given}: here it has to be {value}")
        if kind == "ConformerEncoder":
            names = inspect.signature(model.Conformer).parameters.keys() - {"feat_in"}
            rest = {name: own[name] for name in own if name in names}
            if rest["conv_context_size"] not in (None, "causal"):
                rest["conv_context_size"] = [*map(int, model.as_list(rest["conv_context_size"]))]
            self.modality_adapter = model.Conformer(encoder.width, **rest)
            inner = self.modality_adapter.width
        elif kind == "AudioAdaptor":
            rest = own["adaptor"] | {"embedding_rms": rms}
            self.modality_adapter = model.AudioAdaptor(encoder.width, wide, **rest)
        elif kind == "IdentityConnector":
            self.modality_adapter = nn.Identity()
        else:
            known = "ConformerEncoder, IdentityConnector, AudioAdaptor"
            raise model.UserError(f"modality_adapter._target_: {kind} is none of {known}")
        if kind != "AudioAdaptor":
            self.proj = nn.Linear(inner, wide)
            self.proj.weight.data.mul_(3**0.5 * rms)  # as loud as the LLM's embeddings
            self.proj.bias.data.mul_(rms)
        if speech == "ctc":
            if not start.get("ctc_tokens"):
                raise model.UserError("perception.speech=ctc: needs an init_from with a CTC head")
            self.ctc = model.CTCHead(table, start["ctc_tokens"])

    def out_lens(self, frames):
        return getattr(self.modality_adapter, "out_lens", int)(frames)

    def forward(self, feats, lens):
        trains = any(p.requires_grad for p in self.encoder.parameters())
        with contextlib.nullcontext() if trains else torch.no_grad():
            x, lens = self.encoder(feats, lens)
        x, adapter = x.float(), self.modality_adapter
        if self.training and self.noise:
            x = x + self.noise * torch.randn_like(x)
        if self.ctc is not None:
            heard = model.hear(adapter, self.ctc, x, lens, "ctc", read_ctc=False)
            return heard.speech, heard.speech_lens
        x, lens = (x, lens) if isinstance(adapter, nn.Identity) else adapter(x, lens)
        return self.proj(x), lens


class SALM(nn.Module):
    """Perception and LLM in one module, so that DDP or FSDP wraps one forward pass."""

    def __init__(self, perception, llm, tokenizer, cfg):
        super().__init__()
        self.perception, self.llm, self.tokenizer, self.cfg = perception, llm, tokenizer, cfg
        self.stop_id = model.end_of_turn(tokenizer)
        self.inherited = set()  # names of what an earlier run has changed

    def forward(self, feats, batch, decode=False):
        """Sums over the batch: ce, kl (nats), right, agree; or greedy answers, lists of ids."""
        embed, nobody = self.llm.get_input_embeddings(), not batch.recordings
        heard = torch.zeros(0, 1, embed.embedding_dim, device=feats.device), batch.lens[:0]
        heard = heard if nobody else self.perception(feats, batch.lens)
        if decode:
            asked = [row["asked"] for row in batch.rows]
            spliced = model.splice_rows(embed, asked, *heard, pad_left=True)
            most = [self.cfg.data.validation_ds.max_new_tokens] * len(batch.rows)
            return model.greedy_decode(self.llm, spliced, self.stop_id, most)
        teacher = self.teach(batch) if self.cfg.loss.distill_weight else None
        ids, labels = ([row[name] for row in batch.rows] for name in ("ids", "labels"))
        spliced = model.splice_rows(embed, ids, *heard, labels)
        logits, target = model.label_logits(self.llm, spliced)
        ce = nn.functional.cross_entropy(logits, target, reduction="sum")
        for p in self.perception.parameters() if nobody else ():  # DDP waits for every gradient
            ce = ce + 0.0 * p.sum() if p.requires_grad else ce
        sums = {"ce": ce, "kl": ce * 0.0, "agree": 0, "positions": spliced.labels.numel()}
        if teacher is not None:
            told = torch.tensor([row["told"] for row in batch.rows for _ in range(row["n"])])
            mine = logits[told.nonzero()[:, 0].to(logits.device)]
            sums["kl"] = distill_loss(mine, *teacher)
            sums["agree"] = (mine.argmax(-1) == teacher[1][:, 0]).sum()
        return sums | {"right": (logits.argmax(-1) == target).sum()}

    @torch.no_grad()
    def teach(self, batch):
        """What the frozen LLM without LoRA says where it reads the recordings' texts: the log
        probabilities (N, K) of its likeliest tokens, and these."""
        ids, labels = [], []
        for row in batch.rows:
            texts = [clip["text"] or "" for clip in row["audio"]]
            texts = [model.mark_special(self.tokenizer, text) for text in texts]
            words = iter([model.turn_to_ids(self.tokenizer, text) for text in texts])
            if row["told"] and row["n"]:
                read = [next(words) if i == model.AUDIO else [i] for i in row["ids"]]
                ids.append([*itertools.chain(*read)])
                said = zip(read, row["labels"], strict=True)
                labels.append([label for part, label in said for _ in part])
        count = len(ids)
        if not count:  # under FSDP all processes have to call the LLM's layers alike
            ids, labels = [[0, 0]], [[model.IGNORE, 0]]
        nothing = torch.zeros(0, 1, self.llm.config.hidden_size, device=self.llm.device)
        embed = self.llm.get_input_embeddings()
        spliced = model.splice_rows(embed, ids, nothing, torch.zeros(0).long(), labels)
        with without_lora(self.llm):
            logits, _ = model.label_logits(self.llm, spliced)
        found = logits.log_softmax(-1).topk(min(self.cfg.loss.distill_top_k, logits.shape[1]))
        return found if count else [part[:0] for part in found]


@contextlib.contextmanager
def without_lora(llm):
    """The LLM as it was pretrained. (PEFT's own switch would unfreeze a frozen LoRA.)"""
    layers = [module for module in llm.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def distill_loss(logits, log_probs, tokens):
    """Sum over positions of KL(teacher || student), in nats, over K tokens and one for the rest.

    Input   logits (N, V) of the student; the teacher's log_probs (N, K) of its likeliest `tokens`
            (N, K). With K = V it is the whole KL, with less a lower bound of it.
    """
    own = logits.log_softmax(-1)
    kl = (log_probs.exp() * (log_probs - own.gather(1, tokens))).sum()
    if tokens.shape[1] < logits.shape[1]:
        rest = (1 - log_probs.exp().sum(1)).clamp(min=1e-8)  # of the teacher
        own_rest = own.scatter(1, tokens, -math.inf).logsumexp(1)
        kl = kl + (rest * (rest.log() - own_rest)).sum()
    return kl


def learning_rate(step, conf, total):
    """Linear warm-up, then cosine to min_lr at max_steps."""
    peak, own = conf.optimizer.lr, conf.lr_scheduler
    if step < own.warmup_steps:
        return peak * (step + 1) / own.warmup_steps
    end = min(int(own.max_steps), total) if int(own.max_steps) >= 0 else total
    done = min(1.0, (step - own.warmup_steps) / max(1, end - own.warmup_steps))
    return own.min_lr + (peak - own.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


# ---- building ---------------------------------------------------------------


def build(cfg, dtype, device):
    """SALM with the weights of init_from, its parts frozen as freeze_params says."""
    conf, folder, start = cfg.model, Path(cfg.model.init_from), {}
    if conf.init_from:
        path = folder / "config.json"
        start = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        known = start.get("script") in ("train_phase2", "train_salm")
        if not known or start.get("format") != model.FORMAT:
            raise model.UserError(f"model.init_from={folder}: no finished run of a known script")
        if (folder / "ctc_head.pt").is_file():
            start["ctc_tokens"] = model.read_weights(folder / "ctc_head.pt")["token_ids"].tolist()
    found, name = start.get("encoder", {}), conf.pretrained_asr
    options = {key: found[key] for key in ("language", "text_norm", "pad_to_30s") if key in found}
    options["keep_query_frames"] = found.get("query_frames", False)
    encoder = model.load_encoder(NEMO.get(name.removeprefix("nvidia/"), name), **options)
    window = [*map(int, conf.perception.encoder.att_context_size)]
    encoder.identity["att_context_size"] = window
    if window != [-1, -1]:
        model.set_attention_window(encoder, *window)
    lora = OmegaConf.to_container(conf.lora) if conf.lora and conf.lora.r else None
    lora = lora and {key: value for key, value in lora.items() if key != "task_type"}
    if start and (folder / "lora").is_dir():
        if lora:
            raise model.UserError("model.lora: goes on with that of init_from; set model.lora=null")
        lora = folder / "lora"
    llm, tokenizer = model.load_llm(conf.pretrained_llm, dtype, lora=lora)
    model.check_identity(start, {"encoder": encoder.identity, "llm": llm.identity}, folder)
    parts = [*encoder.named_modules(), *llm.named_modules()]
    for name, module in () if conf.pretrained_weights else parts:
        if hasattr(module, "reset_parameters") and "lora_" not in name:
            module.reset_parameters()
    perception = Perception(encoder, cfg, llm.get_input_embeddings().weight, start)
    salm = SALM(perception, llm, tokenizer, cfg)
    if start and start["script"] == "train_salm":
        load_saved(salm, model.read_weights(folder / "salm.pt"), folder / "salm.pt")
    elif start:
        for part, name in ((perception.modality_adapter, "adaptor_phase2_final.pt"),
                           (perception.ctc, "ctc_head.pt")):  # fmt: skip
            if part is not None:
                model.load_weights(part, model.read_weights(folder / name), folder / name)
    keep = [*conf.prevent_freeze_params, *([r"^.+\.lora_.+$"] if lora else [])]
    model.freeze_by_name(salm, conf.freeze_params, keep)
    trained = {name: p for name, p in salm.named_parameters() if p.requires_grad}
    if not trained:
        raise model.UserError("nothing trains: freeze_params matches every weight")
    if cfg.loss.distill_weight and any(n.startswith("llm.") and "lora_" not in n for n in trained):
        raise model.UserError("loss.distill_weight: its teacher is the LLM, which has to be frozen")
    for p in trained.values():
        p.data = p.data.float()  # bf16 would round small updates away
    return salm.to(device)


def saved_names(salm):
    """What makes this model of its encoder and LLM: what trains, and the rest of the perception."""
    trains = {name for name, p in salm.named_parameters() if p.requires_grad} | salm.inherited
    parts = ["perception.modality_adapter.", "perception.proj.", "perception.ctc."]
    parts += ["perception.encoder."] * any(n.startswith("perception.encoder.") for n in trains)
    parts += [] if salm.cfg.model.pretrained_weights else ["perception.", "llm."]
    return [name for name in salm.state_dict() if name in trains or name.startswith(tuple(parts))]


def saved_state(salm):
    """{name: whole tensor on the CPU} of saved_names; with FSDP all processes have to ask."""
    state = salm.state_dict()
    state = {name: state[name] for name in saved_names(salm)}
    state = {name: getattr(v, "full_tensor", lambda v=v: v)() for name, v in state.items()}
    return {name: value.detach().cpu() for name, value in state.items()}


def load_saved(salm, weights, where):
    """Weights of saved_names, LoRA apart if they lack it, into a model that is not cut yet; what
    they hold beyond it is saved with it from now on."""
    own = salm.state_dict()
    wrapped = {name: re.sub(r"\.(\w+)$", r".base_layer.\1", name) for name in weights}
    weights = {wrapped[n] if wrapped[n] in own else n: value for n, value in weights.items()}
    salm.inherited |= weights.keys()
    missing, unknown = salm.load_state_dict(weights, strict=False)
    lacking = [n for n in set(missing) & set(saved_names(salm)) if n.startswith("perception.m")]
    if unknown or lacking:
        raise model.UserError(f"{where}: does not fit, for one {(unknown + lacking)[0]}")


def wrap(salm, cfg, world):
    """The module whose forward pass is called: under DDP, cut by FSDP2, or as it is."""
    if cfg.trainer.strategy == "fsdp2":
        scalars = {p for p in salm.parameters() if not p.ndim}  # FSDP cannot cut them
        if any(p.requires_grad for p in scalars):
            raise model.UserError("trainer.strategy=fsdp2: freeze perception.ctc")
        for layer in salm.llm.model.layers:
            fully_shard(layer)
        return fully_shard(salm, ignored_params=scalars)
    if world > 1:
        return nn.parallel.DistributedDataParallel(salm, broadcast_buffers=False)
    return salm


def request_id(row, item, cfg):
    """What the answer to a written request depends on, but the LLM."""
    system = (item.get("tags") or {}).get("system_prompt") or cfg.data.system_prompt
    prompt = row["prompt"] or (item.get("tags") or {}).get("context") or ""
    return model.hash_text([system, prompt, row["target"], cfg.data.answer_tokens])


@torch.no_grad()
def answer_requests(salm, cfg, folder, run):
    """{request_id: the LLM's own answer to the written request} of all spoken_requests;
    answers.jsonl keeps them, so that a later start asks for new ones only."""
    path, wanted, known, found = folder / "answers.jsonl", {}, {}, []
    llm, tag = salm.llm, cfg.model.audio_locator_tag
    if path.is_file():
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        known = {r["id"]: r["answer"] for r in rows if r["llm"] == llm.identity["weights"]}
    for conf in (cfg.data.train_ds, *cfg.data.validation_ds.datasets.values()):
        for item in (item for item in list_items(conf) if item["type"] == TYPES[3]):
            for spec in model.as_list(item["manifest_filepath"]):
                rows = open_manifest(spec, folder.parent / "manifests")
                found_in = list_conversations(spec, item, cfg, {}, folder.parent / "manifests")
                for row, (key, _, turns, _) in zip(rows, found_in, strict=True):
                    name, text = request_id(row, item, cfg), row["target"]
                    if text and name not in known:
                        wanted[name] = key, [(r, t.replace(tag, text)) for r, t in turns[:-1]]
    names = sorted(wanted, key=lambda name: len(wanted[name][1][-1][1]))[run.rank :: run.world]
    nothing = torch.zeros(0, 1, llm.config.hidden_size, device=llm.device), torch.zeros(0).long()
    for first in tqdm(range(0, len(names), 32), "answers", disable=run.rank > 0 or None):
        part = names[first : first + 32]
        rows = [render(salm.tokenizer, wanted[name][1], "\0", answer=True)[0] for name in part]
        with run.amp, without_lora(llm):
            inputs = llm.get_input_embeddings(), rows, *nothing
            spliced = model.splice_rows(*inputs, pad_left=True)
            caps = [cfg.data.answer_tokens] * len(part)
            ids = model.greedy_decode(llm, spliced, salm.stop_id, caps)
        found += zip(part, salm.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True)
    parts = [found] * run.world
    if run.world > 1:
        dist.all_gather_object(parts, found)
    known |= {name: text.strip() for part in parts for name, text in part}
    if run.rank == 0 and known:
        about = {"llm": llm.identity["weights"]}
        rows = [about | {"id": name, "answer": text} for name, text in known.items()]
        model.save(path, [row | {"key": wanted.get(row["id"], ("",))[0]} for row in rows])
    return known


# ---- validation -------------------------------------------------------------


@torch.no_grad()
def evaluate(wrapped, salm, sets, run, swap=False):
    """Scores of every validation set, their means, and a line for each conversation.

    swap: each hears the recordings of another one, half a set away.
    """
    salm.eval()
    for part in salm.modules() if run.world > 1 else ():  # process 0's statistics, which are saved
        for value in part.buffers() if isinstance(part, nn.BatchNorm1d) else ():
            dist.broadcast(value, 0)
    conf, scores, lines = salm.cfg.data.validation_ds, {}, []
    whole_set = salm.cfg.trainer.strategy == "fsdp2"  # each forward pass needs all processes
    rank, world = (0, 1) if whole_set else (run.rank, run.world)
    for name, data in sets.items():
        rows, last = data.rows, len(data.rows) - 1
        chosen = np.unique(np.linspace(0, last, conf.decode_clips or last + 1).astype(int)).tolist()
        audio, swapped = {n: json.loads(rows[n]["audio"]) for n in chosen}, {}
        if swap:
            own = {recording(clip, data): clip for clips in audio.values() for clip in clips}
            half, clips = len(own) // 2, [*own.values()]
            other = dict(zip(own, clips[half:] + clips[:half], strict=True))
            swapped = {n: [other[recording(c, data)] for c in audio[n]] for n in chosen}
        own = Conversations(rows, data.encoder, data.cache_dir, swapped=swapped)
        order = sorted(chosen, key=rows["positions"].__getitem__)[rank::world]  # little padding
        places = range(0, len(order), conf.batch_size)
        places = [(0, 0, [order[n : n + conf.batch_size]]) for n in places]
        found, sums = [], Counter()
        for batch in own.load(places, conf.num_workers, run.device):
            feats = batch.feats.to(run.device)
            with run.amp:
                losses, answers = wrapped(feats, batch), wrapped(feats, batch, decode=True)
            labels, told = batch.counts()
            sums.update({key: float(losses[key]) for key in ("ce", "kl", "right", "agree")})
            sums.update(labels=labels, told=told * bool(salm.cfg.loss.distill_weight))
            texts = salm.tokenizer.batch_decode(answers, skip_special_tokens=True)
            for row, text in zip(batch.rows, texts, strict=True):
                line = {key: row[key] for key in ("key", "target", "reason")}
                found.append({"set": name} | line | {"text": text.strip()})
        parts = [(found, sums)] * world
        if world > 1:
            dist.all_gather_object(parts, (found, sums))
        found, sums = [line for part, _ in parts for line in part], Counter()
        for _, part in parts:
            sums.update(part)  # a sum of Counters would leave a NaN out
        scores |= {f"{key}_{name}": value for key, value in set_scores(found, sums).items()}
        lines += found
    for kind in dict.fromkeys(key.split("_")[1] for key in [*scores]):
        own = [value for key, value in scores.items() if key.split("_")[1] == kind]
        scores[f"val_{kind}"] = sum(own) / len(own)
    salm.train()
    return scores, lines


def recording(clip, data):
    """What tells two recordings apart."""
    row = clip_row(clip, data.cache_dir)
    return row.get("source") or row["key"], row.get("start"), row.get("channel")


def set_scores(lines, sums):
    labels = max(1, sums["labels"])
    pairs = [(line["target"], line["text"]) for line in lines if not line["reason"]]
    scores = {"val_loss": sums["ce"] / labels, "val_acc": sums["right"] / labels}
    if sums["told"]:
        scores |= {"val_kl": sums["kl"] / sums["told"], "val_agree": sums["agree"] / sums["told"]}
    if pairs:
        found = model.error_rate(*zip(*pairs, strict=True))
        same = [model.normalize_text(a) == model.normalize_text(b) for a, b in pairs]
        scores |= {f"val_{found['name']}": found["rate"], "val_exact": sum(same) / len(same)}
    return scores


# ---- the run ----------------------------------------------------------------


def refusals(cfg):
    """What of a configuration cannot run: [(why, the override that mends it)]."""
    perception, found = cfg.model.perception, []
    adapter, name = perception.modality_adapter, cfg.model.pretrained_asr.removeprefix("nvidia/")
    if isinstance(width := NEMO.get(name), int):
        usable = ", ".join(key for key, value in NEMO.items() if isinstance(value, str))
        said = f"pretrained_asr={name}: not in transformers; {usable}, or a Whisper are"
        found.append((said, "model.pretrained_asr=nvidia/parakeet-ctc-0.6b"))
        if adapter.feat_in not in (-1, width):
            said = f"modality_adapter.feat_in={adapter.feat_in}: that encoder has {width}"
            found.append((said, "model.perception.modality_adapter.feat_in=-1"))
    elif width is None and "/" not in name and not Path(name).exists():
        usable = ", ".join(NEMO)
        found.append((f"pretrained_asr={name}: no such folder, and none of {usable}",
                      "model.pretrained_asr=nvidia/parakeet-ctc-0.6b"))  # fmt: skip
    for part in ("encoder", "modality_adapter"):
        given = perception[part].conv_context_size
        if given == "regular" or part == "encoder" and given is not None:
            said = f"{part}.conv_context_size={given}: an encoder has its own, an adapter takes"
            mend = f"model.perception.{part}.conv_context_size=null"
            found.append((f"{said} null, causal or two numbers", mend))
    if adapter.subsampling_factor > 1 and adapter.subsampling != "stacking":
        said = f"modality_adapter.subsampling={adapter.subsampling}: frames are stacked here"
        found.append((said, "model.perception.modality_adapter.subsampling=stacking"))
    for part in ("train_ds", "validation_ds"):
        if cfg.data[part].sample_rate != 16000:
            said = f"data.{part}.sample_rate={cfg.data[part].sample_rate}: encoders hear 16000 Hz"
            found.append((said, f"data.{part}.sample_rate=16000"))
    shar = "Shar is lhotse's; write a manifest or conversations (see --help)"
    conf, sets = cfg.data.train_ds, cfg.data.validation_ds.datasets
    if conf.shar_path or any("shar_path" in item for item in conf.input_cfg):
        mend = "data.train_ds.input_cfg= data.train_ds.shar_path= "
        found.append((f"data.train_ds: {shar}", f"{mend}data.train_ds.manifest_filepath=FILE"))
    for key in (key for key, part in sets.items() if "shar_path" in part):
        mend = f"~data.validation_ds.datasets data.validation_ds.datasets.{key}.manifest_filepath="
        found.append((f"data.validation_ds: {shar}", f"{mend}FILE"))
    if cfg.trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        found.append(("trainer.accelerator: torch sees no GPU", "trainer.accelerator=cpu"))
    if cfg.trainer.precision.startswith("16"):
        said = f"trainer.precision={cfg.trainer.precision}: fp16 overflows in many LLMs"
        found.append((said, "trainer.precision=bf16-true"))
    return found


def check(cfg, say, verbose):
    """Stop at what cannot run; say what changes nothing, with `verbose` what every key does."""
    model.check_marked(cfg, DEFAULTS, say, verbose, all_keys=True)
    if found := refusals(cfg):
        lines = [f"\n  {why}\n      {mend}" for why, mend in found]
        counted = f"{len(found)} settings cannot run; below each what mends it:"
        raise model.UserError(counted + "".join(lines))
    adapter, score = "model.perception.modality_adapter", "exp_manager.checkpoint_callback_params"
    names = [f"val_{kind}" for kind in ("loss", "acc", "wer", "cer", "exact", "kl", "agree")]
    names += [f"{kind}_{name}" for kind in names for name in cfg.data.validation_ds.datasets]
    for key, allowed in {
        f"{adapter}.self_attention_model": ("rel_pos", "abs_pos"),
        f"{adapter}.att_context_style": ("regular", "chunked_limited"),
        f"{adapter}.conv_norm_type": ("batch_norm", "layer_norm"),
        "model.perception.speech": ("", "frames", "ctc"),
        "trainer.strategy": ("auto", "ddp", "fsdp2"),
        "trainer.accelerator": ("auto", "cpu", "gpu", "cuda"),
        "trainer.precision": ("bf16-true", "bf16-mixed", "bf16", "32-true", "32"),
        f"{score}.mode": ("min", "max"), f"{score}.monitor": names,
    }.items():  # fmt: skip
        model.one_of(allowed, cfg, key)
    if cfg.model.lora and cfg.model.lora.task_type != "CAUSAL_LM":
        raise model.UserError("model.lora.task_type: only CAUSAL_LM")
    if max(cfg.loss.ce_weight, cfg.loss.distill_weight) <= 0:
        raise model.UserError("loss: ce_weight or distill_weight has to be over 0")
    model.at_least(1, cfg, "data.train_ds.batch_size", "trainer.accumulate_grad_batches",
                   f"{adapter}.subsampling_factor", f"{adapter}.n_heads", "loss.distill_top_k",
                   "data.validation_ds.batch_size")  # fmt: skip
    for name, part in cfg.data.validation_ds.datasets.items():
        known = {"manifest_filepath", "input_cfg"}
        if not OmegaConf.is_dict(part) or set(part) - known:
            raise model.UserError(f"validation_ds.datasets.{name}: expected one of {known}")
    known = {"step", *names}
    for name in re.findall(r"\{(\w+)", cfg.exp_manager.checkpoint_callback_params.filename):
        if name not in known:
            raise model.UserError(f"{score}.filename: {name} is none of step and scores")
    if cfg.trainer.strategy == "fsdp2" and "RANK" not in os.environ:
        raise model.UserError("trainer.strategy=fsdp2: start with torchrun")


def list_data(cfg, salm, folder, answers, rank):
    """Conversations to train on, those left out, and validation sets {name: Conversations}."""
    cache_dir, encoder = folder.parent / "manifests", salm.perception.encoder
    rest = cfg, salm.tokenizer, salm.perception, answers, cache_dir
    if rank > 0:
        dist.barrier()  # process 0 reads and tokenises; the others find what it has made
    train, sets = read_conversations(cfg.data.train_ds, *rest), {}
    for name, conf in cfg.data.validation_ds.datasets.items():
        sets[name] = Conversations(read_conversations(conf, *rest), encoder, cache_dir)
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    conf, dropped, kept = cfg.data.train_ds, [], []
    most = min(conf.max_tokens, conf.batch_tokens or conf.max_tokens)
    longest = conf.batch_duration if conf.batch_duration and not conf.batch_tokens else math.inf
    names = ["where", "reason", "positions", "key", "seconds"]
    for n, row in enumerate(train.select_columns(names)):
        over = f"over max_tokens or batch_tokens={most}" * (row["positions"] > most)
        over = over or f"over batch_duration={longest}" * (row["seconds"] > longest - 0.02)
        if reason := row["reason"] or over:
            dropped.append({"key": row["key"], "where": row["where"], "reason": reason})
        else:
            kept.append(n)
    for data in sets.values():
        rows = data.rows.select_columns(["key", "where", "reason"])
        broken = [row for row in rows if row["reason"]]
        dropped += broken
        kept = kept if len(broken) < len(data.rows) else []
    if rank == 0:
        model.save(folder / "dropped.jsonl", dropped)
    if len(dropped) > conf.max_dropped or not kept:
        last = f"the last is {dropped[-1]['where']}: {dropped[-1]['reason']}"
        said = f"if files have come since, delete {cache_dir}"
        raise model.UserError(f"{len(dropped)} conversations cannot be used; {last}; {said}")
    return Conversations(train.select(kept), encoder, cache_dir, rank), dropped, sets


def train_step(wrapped, optimizer, batches, cfg, run, window):
    """One optimizer step; adds to `window`. Output: the gradient's norm before clipping."""
    counts = torch.tensor([batch.counts() for batch in batches]).sum(0).float()
    counts = counts.to(run.device, non_blocking=True)
    if run.world > 1:
        dist.all_reduce(counts)  # label tokens of the step, of all processes
    labels, told = counts.clamp(min=1)
    for batch in batches:
        last = batch is batches[-1]  # gradients are summed in the last one
        if hasattr(wrapped, "set_requires_gradient_sync"):
            wrapped.set_requires_gradient_sync(last)
        waits = hasattr(wrapped, "no_sync") and not last
        with wrapped.no_sync() if waits else contextlib.nullcontext():
            with run.amp:
                sums = wrapped(batch.feats.to(run.device, non_blocking=True), batch)
            loss = cfg.loss.ce_weight * sums["ce"] / labels
            loss = loss + cfg.loss.distill_weight * sums["kl"] / told
            (loss * run.world).backward()  # DDP and FSDP average over processes; we want the sum
        own = batch.counts()
        window.update({key: torch.as_tensor(value).detach() for key, value in sums.items()})
        window.update(labels=own[0], told=own[1], audio_s=sum(row["seconds"] for row in batch.rows))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, cfg.trainer.gradient_clip_val or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    window.update(steps=1, grad_norm=norm)
    return norm


def main(cfg, check_only=False):
    conf, keep = cfg.trainer, cfg.exp_manager
    folder = Path(keep.explicit_log_dir or Path(keep.exp_dir or "runs", keep.name, keep.version))
    check(cfg, print if os.environ.get("RANK", "0") == "0" else lambda *_: None, check_only)
    name = {"auto": "auto", "cpu": "cpu"}.get(conf.accelerator, "cuda")
    dtype, instead = "fp32" if conf.precision[:2] == "32" else "auto", "trainer.precision=32-true"
    device, dtype, rank, world = model.start(name, dtype, timedelta(hours=12), instead)
    if conf.devices not in (-1, world / conf.num_nodes):
        wanted = f"torchrun --nproc_per_node {conf.devices} --nnodes {conf.num_nodes}"
        raise model.UserError(f"trainer.devices: this is {world} processes; use {wanted}, or -1")
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    run = SimpleNamespace(device=device, amp=amp, rank=rank, world=world)
    say = print if rank == 0 else lambda *_: None
    torch.manual_seed(cfg.data.train_ds.seed)
    salm = build(cfg, dtype, device)
    for name, part in (("perception", salm.perception), ("llm", salm.llm)):
        trains = sum(p.numel() for p in part.parameters() if p.requires_grad)
        say(f"{name}: {trains:,} of {sum(p.numel() for p in part.parameters()):,} weights train")
    if check_only:
        return
    identity = {"encoder": salm.perception.encoder.identity, "llm": salm.llm.identity}
    identity["perception"] = salm.perception.identity
    lacks = not keep.resume_ignore_no_checkpoint and not (folder / "last.pt").exists()
    if keep.resume_if_exists and lacks:
        raise model.UserError(f"{folder}/last.pt: none; set resume_ignore_no_checkpoint=true")
    state = model.open_run(folder, cfg, identity, keep.resume_if_exists, rank, world)
    answers = answer_requests(salm, cfg, folder, run)
    train, dropped, sets = list_data(cfg, salm, folder, answers, rank)
    groups_of = functools.partial(batch_groups, train.rows, cfg.data.train_ds, world)
    groups, accum = len(groups_of(0)), conf.accumulate_grad_batches
    most = conf.max_steps if conf.max_steps >= 0 else sys.maxsize
    total = min(most, int(conf.max_epochs or sys.maxsize) * groups // accum)
    interval = conf.val_check_interval
    interval *= (conf.limit_train_batches or groups) if interval <= 1 else 1
    identity["data"] = {"conversations": model.hash_text([*train.rows["key"]])}
    if state:
        model.check_identity(state["identity"], identity, folder / "last.pt")
    begin = {"step": 0, "epoch": 0, "used": 0, "kept": [], "spent": 0.0}
    step, epoch, used, kept, spent = ((state or begin)[name] for name in begin)
    first_step = step
    if state:
        load_saved(salm, state["trained"], folder / "last.pt")
    wrapped, own = wrap(salm, cfg, world), cfg.model.optimizer
    trained = [p for p in salm.parameters() if p.requires_grad]
    matrices = {"params": [p for p in trained if p.ndim > 1]}
    vectors = {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0}
    rest = {"lr": own.lr, "betas": tuple(own.betas), "weight_decay": own.weight_decay}
    optimizer = torch.optim.AdamW([matrices, vectors], **rest, fused=True)
    options = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
    if state:
        whole.set_optimizer_state_dict(salm, optimizer, state["optimizer"], options=options)
    places, known = model.endless_groups(groups_of, epoch, used), {row["key"] for row in dropped}
    loader = iter(train.load(places, cfg.data.train_ds.num_workers, device))
    writer = SummaryWriter(folder, purge_step=step + 1) if rank == 0 else None
    hours = sum(train.rows["seconds"]) / 3600
    say(f"train {len(train.rows)} conversations, {hours:.2f} h an epoch, {len(dropped)} left out | "
        f"{total} steps of {accum} x {world} batches | {device} {dtype}, torch "
        f"{torch.__version__}, strategy {conf.strategy}")  # fmt: skip
    if sets and not state and conf.num_sanity_val_steps:
        model.log_metrics(folder, writer, 0, evaluate(wrapped, salm, sets, run)[0])
    salm.train()
    started = since = time.time()
    window = Counter()  # sums since the last log
    bar = tqdm(total=total, initial=step, unit="step", disable=None if rank == 0 else True)
    while step < total:
        torch.manual_seed(cfg.data.train_ds.seed * 1_000_003 + step * world + rank)  # dropout
        lr = learning_rate(step, cfg.model, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = [next(loader) for _ in range(accum)]
        norm = train_step(wrapped, optimizer, batches, cfg, run, window)
        step, epoch, used = step + 1, batches[-1].epoch, batches[-1].used
        bar.update()
        rows = [row for batch in batches for row in batch.rows]
        model.note_dropped(folder, rows, known, cfg.data.train_ds.max_dropped)
        if model.due(step, conf.log_every_n_steps, total):
            model.log_metrics(folder, writer, step, window_row(window, lr, time.time() - since))
            window, since = Counter(), time.time()
        if sets and model.due(step, max(1, int(interval / accum)), total):
            scores, lines = evaluate(wrapped, salm, sets, run)
            model.log_metrics(folder, writer, step, scores)
            for line in lines[:: max(1, len(lines) // 2)] if rank == 0 else ():
                tqdm.write(f"    wanted {line['target']!r}, got {line['text']!r}")
            if rank == 0:
                model.save(folder / "valid.jsonl", lines)
            weights = saved_state(salm)
            publish = functools.partial(save_results, salm, cfg, folder) if rank == 0 else None
            rest = keep, weights, folder, publish
            kept = model.keep_best(kept, scores | {"step": step}, *rest)
        if model.due(step, cfg.save_every, total):
            model.check_gradient(norm, step)
            weights = saved_state(salm)
            state = whole.get_optimizer_state_dict(salm, optimizer, options=options)
            state = {"optimizer": state, "trained": weights, "kept": kept, "identity": identity}
            state |= {"format": model.FORMAT, "world": world, "step": step, "epoch": epoch}
            state |= {"used": used, "config": OmegaConf.to_container(cfg)}
            if rank == 0:
                model.save(folder / "last.pt", state | {"spent": spent + time.time() - started})
                if not sets:
                    save_results(salm, cfg, folder, weights)
    bar.close()
    if sets and (step > first_step or not (folder / "control.json").is_file()):
        scores, lines = evaluate(wrapped, salm, sets, run, swap=True)
        if rank == 0:
            model.save(folder / "control.jsonl", lines)
            model.save(folder / "control.json", scores)
            told = "  ".join(f"{key} {value:.4g}" for key, value in scores.items())
            say(f"with the recordings of other conversations: {told}")
    say(f"done: {step} steps, {spent + time.time() - started:.0f} s -> {folder}")


def window_row(window, lr, seconds):
    """Averages since the last log, of process 0."""
    labels, told, gib = max(1, window["labels"]), window["told"], torch.cuda.max_memory_allocated()
    row = {"ce": float(window["ce"]) / labels, "acc": float(window["right"]) / labels, "lr": lr}
    if float(window["kl"]):
        row |= {"kl": float(window["kl"]) / told, "agree": float(window["agree"]) / told}
    row |= {name: float(window[name]) / window["steps"] for name in ("grad_norm", "positions")}
    return row | {"audio_s_per_s": window["audio_s"] / seconds, "gpu_gib": gib / 2**30}


# ---- results, and infer.py --------------------------------------------------


def save_results(salm, cfg, folder, weights):
    """salm.pt, LoRA as a PEFT folder, and config.json: what infer.py and init_from need."""
    lora = {name: value for name, value in weights.items() if "lora_" in name}
    model.save(folder / "salm.pt", {k: v for k, v in weights.items() if k not in lora})
    if lora:
        lora = {name.removeprefix("llm."): value for name, value in lora.items()}
        model.save_lora(salm.llm, folder / "lora", lora)
    head, perception = salm.perception.ctc, salm.perception
    content = {"format": model.FORMAT, "script": "train_salm", "conf": OmegaConf.to_container(cfg)}
    content |= {"encoder": perception.encoder.identity, "llm": salm.llm.identity}
    content |= {"perception": perception.identity, "ctc_tokens": head and head.token_of}
    first = [*cfg.data.train_ds.input_cfg, {}][0] if not cfg.data.train_ds.manifest_filepath else {}
    content["prompt"] = (first.get("tags") or {}).get("context") or (
        "" if first.get("type") == TYPES[3] else cfg.data.prompt
    )  # where a row of infer.py has none
    model.save(folder / "config.json", content)


def load_listener(folder, cfg, device, dtype):
    """What infer.py hears with; see infer.load_listener. A prompt may hold the tag, once for each
    recording; where it does not, they stand behind it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    own, tag = OmegaConf.create(config["conf"]), config["conf"]["model"]["audio_locator_tag"]
    own.model.init_from, own.model.lora = str(folder), None  # LoRA lies in the folder
    own.model.pretrained_asr = cfg.encoder.name or config["encoder"]["name"]
    own.model.pretrained_llm = cfg.llm.name or config["llm"]["name"]
    salm = model.freeze(build(own, dtype, device))
    system = [] if own.data.system_prompt is None else [("system", own.data.system_prompt)]

    def hear(feats, lens):
        speech, lens = salm.perception(feats, lens)
        return model.Heard(speech, lens, lens), None

    def prompt(row):
        text, count = cfg.prompt or row.get("prompt") or config["prompt"], row.get("recordings", 1)
        text = text.replace("{language}", cfg.language or row.get("language") or "")
        text = text if tag in text else text + tag * count
        if text.count(tag) != count:
            raise model.UserError(f"prompt: {text.count(tag)} x {tag} for {count} recordings")
        return render(salm.tokenizer, [*system, ("user", text)], tag, answer=True)[0]

    return SimpleNamespace(
        encoder=salm.perception.encoder, hear=hear, prompt=prompt, llm=salm.llm, read_ctc=None,
        tokenizer=salm.tokenizer, stop_id=salm.stop_id, ctc=None, about=f"SALM {folder}",
        several=True,
    )  # fmt: skip


if __name__ == "__main__":
    model.run_main(main, DEFAULTS, __doc__, "data.train_ds.batch_size", optional=("model.lora",))
