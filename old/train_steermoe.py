"""SteerMoE: steer a frozen speech encoder, layer by layer, until a frozen LLM can read it.

    python train_steermoe.py configs/steermoe/layer_wise_whisper_qwen7b_libri_train.yaml [key=value ...]
    python train_steermoe.py configs/steermoe/layer_wise_whisper_qwen7b_libri_test.yaml      # the whole test set
    torchrun --nproc_per_node 4 train_steermoe.py CONFIG.yaml
    deepspeed --num_gpus 4 train_steermoe.py CONFIG.yaml --deepspeed_config configs/deepspeed/stage2.json

Model   after every encoder layer l: h += s_l * softmax(router_l(h)) @ V_l; pooling; Linear(D, H); cut to
        max_prompt_tokens. Only V, router, s and the projection train: 5.2 M for Whisper-large-v3 and Qwen2.5-7B.
        steering: null is the linear ablation (all else equal), adaptor=stack the SLAM-ASR bridge (k frames, two
        layers) as a strong baseline.
Loss    cross-entropy of the text and its end-of-turn token, summed over the step's label tokens, / their number.
        inputs  [system, user: prompt | speech | assistant: | text, end of turn]
        labels  [-100                 | -100   | -100       | text, end of turn]

Input   parquet_dirs, eval_dirs: folders of Parquet files, Hugging Face save_to_disk folders, or manifests (JSONL,
        Kaldi, data_aishell:train). Audio as a column of bytes, {bytes, path}, {array, sampling_rate}, or paths.
Output  training.output_dir: steermoe.pt (plain state dict of what trains, best on eval_dirs) and config.json, all that
        infer.py needs; checkpoint-N.pt to resume; metrics.jsonl, steering.jsonl, bad.jsonl, plots/*.png;
        mode=test: test.json, test.jsonl
Papers  SteerMoE arXiv:2510.13558, SLAM-ASR arXiv:2402.08846. Departures from SteerMoE's code: its documented settings
        are the ones that act; learning rates differ by group; clipping stands before the step; the encoder's dropout
        stays off; padding is neither attended to nor paid for; the chat template is used; decoding is greedy; test
        sets are scored whole. Layer scales train at the router's rate: at 1e-2 Adam would move 0.1 by 10 % a step.
Logged  ce (nats per label token), acc (share of label tokens predicted right, teacher-forced); eval_ce and eval_acc,
        the same on eval_dirs; wer_raw, wer, cer_raw, cer (greedy decoding; raw as written, else normalised),
        error_rate (WER, CER for Chinese; task=qa: 1 - exact_match), lr, norm_steering and norm (gradient norms before
        clipping), audio_s_per_s, tokens (LLM positions per step incl. padding).
        steering.jsonl, per layer: scale, norm of each V_e, mean gate of each expert, entropy (nats) of the gates, top
        (share of frames whose highest gate is that of the layer's most chosen expert); of process 0.
"""

import difflib
import io
import json
import math
import os
import random
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import model

DEFAULTS = {
    "mode": "train",  # train, or test: score training.output_dir's steermoe.pt on parquet_dirs
    "task": "asr",  # asr, or qa: the row's question follows the prompt, scored by exact match
    "whisper_encoder.model_path": "",  # hub name or folder; this or conformer_encoder.model_path
    "whisper_encoder.feature_dim": 0,  # width, checked against the model; 0: not checked
    "whisper_encoder.num_layers": 0,
    "conformer_encoder.model_path": "",  # Parakeet (FastConformer), SenseVoice
    "conformer_encoder.feature_dim": 0,
    "conformer_encoder.num_layers": 0,
    "llm_decoder.model_name": ...,
    "llm_decoder.max_length": 512,  # LLM positions of a training clip: speech, prompt and text
    "llm_decoder.use_cache": True,  # key-value cache in decoding (training keeps none); False: slower, less memory
    "steering": "",  # `steering: null` instead of the section: no steering, the linear ablation
    "steering.num_experts": 8,
    "steering.steering_scale": 0.1,
    "steering.use_layer_scales": True,  # False: every scale stays steering_scale
    "steering.use_gradient_clipping": True,
    "steering.steering_gradient_clip": 1.0,  # highest gradient norm of V, router and scales together
    "training.output_dir": ...,
    "training.logging_dir": "",  # of TensorBoard; empty: output_dir
    "training.batch_size": 4,  # clips per process
    "training.epochs": 10,
    "training.learning_rate": 1e-4,  # of the projection; all rates are peaks
    "training.steering_learning_rate": 1e-2,  # of V
    "training.router_learning_rate": 1e-3,  # of router and layer scales
    "training.weight_decay": 0.01,  # of projection and router matrices only
    "training.warmup_steps": 1000,
    "training.gradient_clipping": 1.0,  # highest gradient norm of all that trains; 0: no clipping
    "training.fp16": False,  # half precision: fp16, for Qwen bf16, in which it does not overflow; False: fp32
    "training.use_deepspeed": False,
    "training.gradient_checkpointing": False,  # compute layers again in the backward pass: less memory, a third slower
    "parquet_dirs": [],
    "eval_dirs": [],  # dev set; empty: no evaluation, the last weights are kept
    "audio_column": "audio",  # of Parquet and save_to_disk folders; manifests have their own names
    "text_column": "text",
    "question_column": "question",
    "sample_rate": 16000,
    "max_audio_length": 30.0,  # seconds
    "max_text_length": 448,  # tokens
    "filter_dataset": True,  # leave out and count training clips over max_audio_length, max_text_length, max_length
    "normalize_text": True,  # train on normalised text (lower case, no punctuation)
    "textual_prompt": "please transcribe the audio content into text: ",
    "system_prompt": None,  # None: the chat template's own; "" an empty one
    "adaptor": "linear",  # linear, or stack: stack_frames frames -> Linear -> GELU -> Linear -> LayerNorm
    "stack_frames": 5,
    "stack_hidden": 2048,
    "max_prompt_tokens": 2048,  # speech positions; what is longer is cut, and counted
    "use_adapter": True,  # False: no projection, for an LLM as wide as the encoder
    "save_total_limit": 2,  # newest checkpoints kept; 0: all
    "logging_steps": 100,
    "eval_steps": 1000,
    "eval_batch_size": 16,
    "save_steps": 1000,
    "log_steering_analysis": True,  # steering.jsonl while training, plots at the end
    "steering_log_interval": 100,  # steps
    "clip_steering_gradients": True,  # False, like steering.use_gradient_clipping, turns steering_gradient_clip off
    "use_early_stopping": False,
    "early_stopping_patience": 3,  # evaluations without a better error rate
    "pooling_kernel_size": 4,  # frames; 1: no pooling
    "pooling_position": 0,  # after which layer; 0: the last
    "pooling_type": "avg",  # avg or max
    "pad_to_30s": False,  # Whisper: pad clips as in its training, at 10 times the cost
    "max_steps": 0,  # > 0: exactly so many steps, whatever training.epochs says
    "max_bad": 100,  # stop when more clips than this cannot be read
    "dataloader_num_workers": 2,  # processes that read audio and make features
    "deepspeed_config": "",  # also --deepspeed_config FILE
    "deepspeed_launcher": False,  # set by the --local_rank that the deepspeed launcher passes
    "resume": False,
    "seed": 0,
    "device": "auto",
}
MODEL_KEYS = ("steering.num_experts", "steering.steering_scale", "steering.use_layer_scales", "adaptor", "stack_frames",
              "stack_hidden", "max_prompt_tokens", "use_adapter", "pooling_kernel_size", "pooling_position",
              "pooling_type", "pad_to_30s", "textual_prompt", "system_prompt", "task")  # fmt: skip


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


# ---- command line and checks ------------------------------------------------------------------------------------


def split_arguments(arguments):
    """Command line -> arguments for load_config: the launcher's options as keys, `steering: null` as no experts."""
    waiting, found = list(arguments), []
    while waiting:
        argument = waiting.pop(0)
        if argument.startswith("--deepspeed_config"):
            _, equals, value = argument.partition("=")
            if not equals and not waiting:
                raise SystemExit("error: --deepspeed_config needs a file, such as configs/deepspeed/stage2.json")
            found.append(f"deepspeed_config={value if equals else waiting.pop(0)}")
        elif argument.startswith("--local_rank"):
            if "=" not in argument:
                waiting.pop(0)
            found.append("deepspeed_launcher=true")
        else:
            found.append(argument)
            if argument == "steering=null" or Path(argument).is_file() and has_no_steering(argument):
                found.append("steering.num_experts=0")
    return found


def has_no_steering(path):
    """True if a YAML file says `steering: null` (an empty section); load_config itself reads that as 'not given'."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):  # load_config will say what is wrong with it
        return False
    return isinstance(tree, dict) and "steering" in tree and tree["steering"] is None


def check_config(cfg):
    """What one key alone cannot show."""
    for key, allowed in (("mode", ("train", "test")), ("task", ("asr", "qa")), ("steering", ("", "null"))):
        if cfg[key] not in allowed:
            raise ValueError(f"{key}: expected one of {', '.join(filter(None, allowed))}, got {cfg[key]!r}")
    given = [kind for kind in ("whisper_encoder", "conformer_encoder") if cfg[f"{kind}.model_path"]]
    if len(given) != 1:
        raise ValueError("give one of whisper_encoder.model_path and conformer_encoder.model_path, not "
                         f"{' and '.join(given) or 'none'}")
    if not cfg["parquet_dirs"]:
        raise ValueError("parquet_dirs: give at least one Parquet folder, save_to_disk folder or manifest")
    if cfg["use_early_stopping"] and cfg["mode"] == "train" and not cfg["eval_dirs"]:
        raise ValueError("use_early_stopping watches the error rate on eval_dirs, which is empty: give a dev set")
    return given[0]


# ---- data: Parquet and save_to_disk folders, manifests ----------------------------------------------------------


def arrow_files(folder, copies):
    """Arrow files of a folder, at any depth; Parquet files are copied to Arrow once, under `copies`.

    An Arrow file is memory-mapped and read by row; Parquet can only be read by row group, a hundred clips for one.
    """
    found = [path for path in sorted(folder.rglob("*.arrow")) if not path.name.startswith(("cache-", "tmp"))]
    for path in sorted(folder.rglob("*.parquet")):
        name = model.hash_text([str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns])
        copy = copies / f"{path.stem}-{name}.arrow"
        if not copy.is_file():
            copies.mkdir(parents=True, exist_ok=True)
            try:
                with pq.ParquetFile(path) as source:
                    write_atomic(copy, lambda file, source=source: copy_batches(source, file))
            except pa.ArrowException as error:
                raise ValueError(f"{path}: not readable as Parquet ({error})") from error
        found.append(copy)
    return found


def copy_batches(source, file):
    with pa.ipc.new_stream(file, source.schema_arrow) as writer:
        for batch in source.iter_batches(batch_size=64):
            writer.write_batch(batch)


def open_table(path, columns):
    """Memory-mapped table of one Arrow file; `columns` {name: what it must be able to be} are checked."""
    source = pa.memory_map(str(path))
    try:
        try:
            table = pa.ipc.open_stream(source).read_all()
        except pa.ArrowInvalid:  # the file format, with a footer
            table = pa.ipc.open_file(source).read_all()
    except pa.ArrowException as error:
        raise ValueError(f"{path}: not readable as Arrow ({error})") from error
    for name, wanted in columns.items():
        if name not in table.column_names:
            raise ValueError(f"{path}: has no column {name!r}; it has {', '.join(table.column_names)}")
        kind = table.schema.field(name).type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        fields = {field.name for field in kind} if pa.types.is_struct(kind) else set()
        audio = text or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or bool(
            fields & {"bytes", "path"} or fields >= {"array", "sampling_rate"})
        if not (text if wanted == "text" else audio):
            raise ValueError(f"{path}: column {name!r} is of type {kind}, expected " + (
                "text" if wanted == "text" else "audio: bytes, {bytes, path}, {array, sampling_rate} or paths"))
    return table


def read_folder(folder, cfg):
    """Rows of a Parquet or save_to_disk folder: key, target, question, condition; the audio stays in the file."""
    columns = {cfg["audio_column"]: "audio", cfg["text_column"]: "text"}
    columns |= {cfg["question_column"]: "text"} if cfg["task"] == "qa" else {}
    files = arrow_files(folder, Path(cfg["training.output_dir"]) / "arrow")
    if not files:
        raise ValueError(f"{folder}: holds no .parquet and no .arrow file")
    rows = []
    for path in files:
        table = open_table(path, columns)
        texts = table.column(cfg["text_column"]).to_pylist()
        extra = {name: table.column(column).to_pylist() for name, column in (
            ("question", cfg["question_column"]), ("condition", "condition")) if column in table.column_names}
        for index, text in enumerate(texts):
            row = {"key": f"{folder.name}/{path.stem}/{index}", "target": text or "", "source": str(path),
                   "cell": (table.column(cfg["audio_column"]), index, folder)}
            rows.append(row | {name: values[index] for name, values in extra.items()})
    return rows


def read_rows(specs, cfg):
    """Every folder or manifest of a list -> rows, with unique keys."""
    rows, seen = [], {}
    for spec in map(str, specs):
        folder = Path(spec)
        if folder.is_dir() and not (folder / "wav.scp").is_file():
            found = read_folder(folder, cfg)
        else:
            found = model.read_manifest(spec)
        for row in found:
            if row["key"] in seen:
                raise ValueError(f"{spec}: key {row['key']!r} stands in {seen[row['key']]} too; keys are unique")
            seen[row["key"]] = spec
            if cfg["task"] == "qa" and not row.get("question"):
                raise ValueError(f"{row.get('where', spec)}: {row['key']} has no question, which task=qa needs")
        rows += found
    return rows


def cell_of(row):
    """Audio of a row: a path, bytes, or (samples (N,) float32, rate)."""
    if "cell" not in row:
        return row["source"]
    column, index, folder = row["cell"]
    value = column[index]
    if not value.is_valid:
        raise model.AudioError(f"{row['key']}: the audio is null")
    if pa.types.is_struct(value.type):
        fields = {field.name for field in value.type}
        if "array" in fields and value["array"].is_valid:
            samples = value["array"].values.to_numpy(zero_copy_only=False)
            scale = 1.0 if samples.dtype.kind == "f" else 2.0 ** (8 * samples.dtype.itemsize - 1)  # int16: 32768
            return samples.astype(np.float32) / scale, int(value["sampling_rate"].as_py())
        value = value["bytes"] if "bytes" in fields and value["bytes"].is_valid else value["path"]
        if not value.is_valid:
            raise model.AudioError(f"{row['key']}: the audio has neither bytes nor a path")
    value = value.as_py()
    return str(folder / value) if isinstance(value, str) else value


def seconds_of(row):
    """Duration, from the header alone."""
    cell = cell_of(row)
    if isinstance(cell, tuple):
        return len(cell[0]) / cell[1]
    if isinstance(cell, str) and not Path(cell).is_file():
        raise model.AudioError(f"{cell}: no such file")
    try:
        return soundfile.info(io.BytesIO(cell) if isinstance(cell, bytes) else cell).duration
    except (soundfile.LibsndfileError, RuntimeError, TypeError) as error:
        raise model.AudioError(f"{row['key']}: not readable as audio ({error})") from error


def read_wave(row, rate):
    """wave (N,) float32 at `rate`; AudioError names the row."""
    cell = cell_of(row)
    if isinstance(cell, str):
        return model.load_audio(cell, rate)
    if isinstance(cell, tuple):
        if not len(cell[0]) or not np.isfinite(cell[0]).all():
            raise model.AudioError(f"{row['key']}: holds no samples, or NaN or infinite ones")
        return model.resample(torch.from_numpy(cell[0]), cell[1], rate)
    with tempfile.NamedTemporaryFile(suffix=".audio") as file:  # one reader for files and bytes, with the same checks
        file.write(cell)
        file.flush()
        try:
            return model.load_audio(file.name, rate)
        except model.AudioError as error:
            raise model.AudioError(str(error).replace(file.name, row["key"])) from error


def list_utterances(specs, cfg, parts, filtered):
    """Rows -> (utterances, rows left out with their reason).

    filtered  training: what the limits exclude is left out. Evaluation keeps every row; one that cannot be heard
              ("reason") is scored as an empty answer, so that the error rate is that of the whole set.
    """
    encoder, tokenizer = parts.encoder, parts.tokenizer
    utterances, left_out = [], []
    for row in read_rows(specs, cfg):
        target = model.normalize_text(row["target"]) if cfg["normalize_text"] else row["target"].strip()
        row = row | {"reference": row["target"], "ids": model.text_to_ids(tokenizer, target), "seconds": 0.0}
        row["prompts"] = parts.prompt(row)
        reason, limits, readable = "" if row["ids"] or not filtered else "empty text", cfg["filter_dataset"], True
        try:
            row["seconds"] = seconds = seconds_of(row)
            frames = -(-encoder.num_frames(round(seconds * encoder.sample_rate)) // cfg["pooling_kernel_size"])
            frames = -(-frames // cfg["stack_frames"]) if cfg["adaptor"] == "stack" else frames
            row["cut"] = frames > cfg["max_prompt_tokens"]
            frames = min(frames, cfg["max_prompt_tokens"])
            row["positions"] = frames + sum(map(len, row["prompts"])) + len(row["ids"]) + 1
            if limits and seconds > cfg["max_audio_length"]:
                reason = f"{seconds:.2f} s is over max_audio_length={cfg['max_audio_length']}"
            elif seconds < 0.1:
                reason = f"{seconds:.2f} s is under 0.1 s"
            elif limits and filtered and len(row["ids"]) > cfg["max_text_length"]:
                reason = f"{len(row['ids'])} tokens of text are over max_text_length={cfg['max_text_length']}"
            elif limits and filtered and row["positions"] > cfg["llm_decoder.max_length"]:
                reason = f"{row['positions']} positions are over llm_decoder.max_length={cfg['llm_decoder.max_length']}"
        except model.AudioError as error:
            reason, readable = str(error), False
        if reason:
            left_out.append({"key": row["key"], "source": row["source"], "reason": reason, "readable": readable})
        if not reason or not filtered:
            utterances.append(row | {"reason": reason})
    if not utterances:
        why = f"; the first was left out: {left_out[0]['reason']}" if left_out else ""
        raise ValueError(f"{', '.join(map(str, specs))}: no usable utterance{why}")
    return utterances, left_out


class Clips(torch.utils.data.Dataset):
    """utterance -> (features (T, F), reason); one second of silence takes the place of a clip that cannot be read."""

    def __init__(self, utterances, encoder):
        self.utterances, self.encoder = utterances, encoder

    def __len__(self):
        return len(self.utterances)

    def __getitem__(self, index):
        row, rate = self.utterances[index], self.encoder.sample_rate
        try:
            if row["reason"]:
                raise model.AudioError(row["reason"])
            return self.encoder.features(read_wave(row, rate), row["key"]), ""
        except model.AudioError as error:
            return self.encoder.features(torch.zeros(rate)), str(error)


def read_batches(utterances, batches, encoder, cfg, bad):
    """Batches (lists of indices) -> feats (B, T, F), lens (B,), utterances with ids [] where the audio was bad."""
    workers = cfg["dataloader_num_workers"]
    loader = torch.utils.data.DataLoader(
        Clips(utterances, encoder), batch_sampler=batches, collate_fn=list, num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # its own: the default would draw from the run's random state
    )
    known = {row["key"] for row in bad}
    for batch, items in zip(batches, loader):
        rows = []
        for index, (_, reason) in zip(batch, items):
            row = utterances[index]
            if reason and row["key"] not in known:
                known.add(row["key"])
                bad.append({"key": row["key"], "source": row["source"], "reason": reason, "readable": False})
            rows.append(row | {"reason": reason, "ids": [] if reason else row["ids"]})
        lens = torch.tensor([len(feats) for feats, _ in items])
        yield torch.nn.utils.rnn.pad_sequence([feats for feats, _ in items], batch_first=True), lens, rows


def stream(train, encoder, cfg, epoch, used, bad):
    """Endless batches of this process from (epoch, used) on: yields epoch, used, feats, lens, utterances."""
    rank, world = rank_and_world()
    while True:
        batches = train_batches(train, cfg, epoch)[used:]
        mine = [batch[rank::world].tolist() for batch in batches]
        for feats, lens, rows in read_batches(train, mine, encoder, cfg, bad):
            used += 1
            yield epoch, used, feats, lens, rows
        epoch, used = epoch + 1, 0


def train_batches(train, cfg, epoch):
    lengths, (_, world) = [row["positions"] for row in train], rank_and_world()
    size = cfg["training.batch_size"]
    return epoch_batches(lengths, size, size * max(lengths), world, cfg["seed"], epoch)


# order of batches: the same functions as in train_phase1.py and train_phase2.py (tests/test_copies.py)


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


def epoch_batches(lengths, size, budget, world, seed, epoch):
    """Batches (arrays of indices) of one epoch, a pure function of seed and epoch: neighbours in length, shuffled.

    The longest batch comes first: if memory does not suffice, the run ends in its first step and not in its last.
    """
    rng, lengths = random.Random(f"{seed}-{epoch}"), np.asarray(lengths, np.int64)
    if len(lengths) < world or lengths.max() > budget:
        raise ValueError(f"{len(lengths)} clips, the longest of {lengths.max(initial=0)} positions, do not fill "
                         f"{world} process(es) of {budget} positions: raise batch_tokens (in phase 1: batch_frames), "
                         "or leave the longest clips out")
    order = np.random.default_rng(rng.getrandbits(64)).permutation(len(lengths)).astype(np.int32)
    ends = [*range(32 * size * world, len(order) - world + 1, 32 * size * world), len(order)]  # no pool below `world`
    batches = []
    for start, end in zip([0, *ends], ends):
        part = order[start:end]
        batches += cut_batches(part[np.argsort(lengths[part], kind="stable")], lengths, size, budget, world)
    rng.shuffle(batches)
    if epoch == 0:
        worst = max(range(len(batches)), key=lambda b: len(batches[b]) * lengths[batches[b][-1]])  # sorted inside
        batches.insert(0, batches.pop(worst))
    return batches


# ---- model ------------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """Frozen encoder with its steering hooks, all that trains, and frozen LLM, so that DDP wraps one forward pass."""

    def __init__(self, encoder, trained, llm, tokenizer, cfg):
        super().__init__()
        self.encoder, self.trained, self.llm = encoder, trained, llm
        self.tokenizer, self.cfg, self.stop_id = tokenizer, cfg, model.end_of_turn(tokenizer)

    def prompt(self, row):
        """The one prompt of training and test, as token ids before and after the speech."""
        text = row.get("prompt") or self.cfg["textual_prompt"]
        text += row["question"] if self.cfg["task"] == "qa" else ""
        return model.build_prompt(self.tokenizer, text, None, row.get("language"), (), self.cfg["system_prompt"])

    def listen(self, feats, lens, rows, targets=None, pad_left=False):
        """Features (B, T, F) -> LLM inputs, by model.splice."""
        speech, speech_lens = self.trained(*self.encoder(feats, lens))  # (B, S, H)
        prompts = [row["prompts"] for row in rows]
        return model.splice(self.llm.get_input_embeddings(), prompts, speech, speech_lens, targets, pad_left)

    def forward(self, feats, lens, rows):
        """Sums over the batch: CE (nats), right tokens; number of LLM positions. A row without ids adds 0."""
        targets = [[*row["ids"], self.stop_id] if row["ids"] else [] for row in rows]
        spliced = self.listen(feats, lens, rows, targets)
        shared = model.shared_prefix([row["prompts"] for row in rows])
        if self.cfg["training.gradient_checkpointing"] or self.cfg["deepspeed_launcher"]:
            shared = 0  # layers computed again would write to its key-value cache twice; ZeRO 3 would fetch them twice
        ce, _, right = model.transcript_loss(self.llm, spliced, shared)
        return ce, right, spliced["labels"].numel()


def precision(cfg):
    """Dtype of frozen LLM and autocast; what trains is fp32 always."""
    if not cfg["training.fp16"]:
        return torch.float32
    path = model.find_model(cfg["llm_decoder.model_name"]) / "config.json"
    kind = json.loads(path.read_text(encoding="utf-8")).get("model_type", "")
    if kind.startswith("qwen") or cfg["deepspeed_launcher"]:
        print("training.fp16: bf16 is used instead, " + (
            "Qwen overflows in fp16" if kind.startswith("qwen") else "it needs no loss scaling under DeepSpeed"))
        return torch.bfloat16
    return torch.float16


def mixed(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def build(cfg, kind, device, dtype):
    """Load encoder and LLM, check them against the configuration, hook the steering in."""
    encoder = model.load_encoder(cfg[f"{kind}.model_path"], pad_to_30s=cfg["pad_to_30s"]).to(device)
    layers = model.encoder_layers(encoder)
    for key, found in (("feature_dim", encoder.width), ("num_layers", len(layers))):
        if cfg[f"{kind}.{key}"] not in (0, found):
            raise ValueError(f"{kind}.{key}={cfg[f'{kind}.{key}']}, but {cfg[f'{kind}.model_path']} has {found}")
    if cfg["sample_rate"] != encoder.sample_rate:
        raise ValueError(f"sample_rate={cfg['sample_rate']}, but the encoder takes {encoder.sample_rate} Hz; audio of "
                         "any rate is resampled to that")
    llm, tokenizer = model.load_llm(cfg["llm_decoder.model_name"], dtype, device)
    table = llm.get_input_embeddings().weight
    torch.manual_seed(cfg["seed"])  # so that what starts at random does not depend on what was loaded before
    trained = model.SteerMoE(encoder, table.shape[1], cfg, model.embedding_rms(table)).to(device)
    if not any(p.requires_grad for p in trained.parameters()):
        raise ValueError("nothing trains: give steering, or use_adapter=true")
    if cfg["training.gradient_checkpointing"]:
        for layer in (*layers, *llm.model.layers):
            layer.forward = checkpointed(layer.forward)
    return Parts(encoder, trained, llm, tokenizer, cfg)


def checkpointed(forward):
    """Compute a frozen layer again in the backward pass. Not transformers' own switch: that is off in eval mode."""

    def run(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return torch.utils.checkpoint.checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False,
                                                 **kwargs)

    return run


# ---- optimiser --------------------------------------------------------------------------------------------------


def make_optimizer(trained, cfg, device):
    """AdamW with a group for each learning rate; no weight decay on V, scales and biases."""
    peaks = {"steering": cfg["training.steering_learning_rate"], "router": cfg["training.router_learning_rate"],
             "projection": cfg["training.learning_rate"]}
    groups = {}
    for name, parameter in trained.named_parameters():
        kind = "steering" if name == "steering.vectors" else "router" if name.startswith("steering.") else "projection"
        decays = parameter.ndim > 1 and kind != "steering" and name != "steering.router_bias"
        group = groups.setdefault((kind, decays), {
            "name": kind, "peak": peaks[kind], "lr": peaks[kind], "params": [],
            "weight_decay": cfg["training.weight_decay"] if decays else 0.0})
        group["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), fused=device.type in ("cuda", "cpu"))


def set_learning_rates(optimizer, step, total, cfg):
    """The same warm-up and cosine for each group, times its own peak. Output: {name: rate}."""
    shape = {"optim.lr": 1.0, "optim.warmup_steps": cfg["training.warmup_steps"], "optim.schedule": "cosine"}
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * learning_rate(step, total, shape)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


def clip_gradients(trained, cfg, finite=True):
    """Clip steering, then everything; the norms before clipping. finite: raise at NaN (fp16 skips such steps)."""
    steered = list(trained.steering.parameters()) if trained.steering is not None else []
    clipped = cfg["steering.use_gradient_clipping"] and cfg["clip_steering_gradients"]
    limits = (("norm_steering", steered, cfg["steering.steering_gradient_clip"] if clipped else 0.0),
              ("norm", list(trained.parameters()), cfg["training.gradient_clipping"]))
    return {name: nn.utils.clip_grad_norm_(parameters, limit or math.inf, error_if_nonfinite=finite)
            for name, parameters, limit in limits if parameters}


def learning_rate(step, total, cfg):
    """Linear warm-up over steps 0..warmup-1, then cosine to 0 or constant: a pure function of the step."""
    if cfg["optim.schedule"] not in ("cosine", "constant"):
        raise ValueError(f"optim.schedule: expected cosine or constant, got {cfg['optim.schedule']!r}")
    warmup = cfg["optim.warmup_steps"]
    if step < warmup:
        return cfg["optim.lr"] * (step + 1) / warmup
    if cfg["optim.schedule"] == "constant":
        return cfg["optim.lr"]
    return cfg["optim.lr"] * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


# ---- what the experts do ----------------------------------------------------------------------------------------


class GateUsage:
    """Sums over real frames of what the router does; to be set as Steering.watch."""

    def __init__(self, layers, experts):
        self.gates, self.chosen = torch.zeros(layers, experts), torch.zeros(layers, experts)
        self.entropy, self.frames = torch.zeros(layers), torch.zeros(layers)

    def __call__(self, layer, gates, real):
        gates = gates[real].cpu()  # (frames, E)
        self.gates[layer] += gates.sum(0)
        self.chosen[layer] += torch.bincount(gates.argmax(-1), minlength=gates.shape[1])
        self.entropy[layer] -= torch.xlogy(gates, gates).sum()
        self.frames[layer] += len(gates)

    def mean(self):
        """Mean gate (L, E)."""
        return self.gates / self.frames[:, None].clamp(min=1)

    def per_layer(self, steering):
        """One dict a layer, as steering.jsonl holds them."""
        frames, mean, norms = self.frames.clamp(min=1), self.mean(), steering.vectors.detach().norm(dim=-1).cpu()
        return [{"layer": n, "scale": round(float(steering.scales[n].detach()), 6),
                 "norms": [round(x, 6) for x in norms[n].tolist()], "gates": [round(x, 6) for x in mean[n].tolist()],
                 "entropy": round(float(self.entropy[n] / frames[n]), 6),
                 "top": round(float(self.chosen[n].max() / frames[n]), 6)} for n in range(len(frames))]


def log_steering(path, writer, step, usage, steering):
    layers = usage.per_layer(steering)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "layers": layers}) + "\n")
    for row in layers:
        for name in ("scale", "entropy", "top"):
            writer.add_scalar(f"steering_{name}/{row['layer']}", row[name], step)


@torch.no_grad()
def plot_steering(parts, utterances, cfg, device, dtype, folder):
    """plots/*.png: layers x experts, gates over time of three clips, gate usage by condition."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steering, encoder = parts.trained.steering, parts.encoder
    shape, folder = steering.vectors.shape[:2], folder / "plots"
    folder.mkdir(exist_ok=True)
    usable = [row for row in utterances if not row["reason"]][:200]  # enough for a mean, seconds even on a CPU
    overall, conditions, clips = GateUsage(*shape), {}, []
    for number, (feats, lens, rows) in enumerate(
            read_batches(usable, [[i] for i in range(len(usable))], encoder, cfg, [])):
        if rows[0]["reason"]:
            continue
        own = conditions.setdefault(str(rows[0].get("condition") or ""), GateUsage(*shape))
        seen = {}

        def watch(layer, gates, real, own=own, seen=seen):
            overall(layer, gates, real)
            own(layer, gates, real)
            seen[layer] = gates[0][real[0]].cpu()  # (T, E)

        steering.watch = watch
        with mixed(device, dtype):
            encoder(feats.to(device), lens)
        if len(clips) < 3:
            clips.append((usable[number], seen))
    steering.watch = None

    def heat(axis, values, title, **limits):
        picture = axis.imshow(values.numpy(), aspect="auto", cmap="magma", **limits)
        axis.set(title=title, xlabel="expert", ylabel="layer")
        axis.yaxis.get_major_locator().set_params(integer=True)
        return picture

    def save(figure, name):
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)

    figure, axis = plt.subplots(figsize=(5, 5), layout="constrained")
    figure.colorbar(heat(axis, overall.mean(), f"mean gate over {len(usable)} clips"))
    save(figure, "experts.png")
    for number, (row, seen) in enumerate(clips):
        wave = read_wave(row, encoder.sample_rate).numpy()
        figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
        noise = 1e-6 * np.random.default_rng(0).standard_normal(len(wave))  # digital silence has no logarithm
        top.specgram(wave + noise, NFFT=400, Fs=encoder.sample_rate, noverlap=240, cmap="magma")
        top.set(ylabel="Hz", title=f"{row['key']}: {row['reference']}"[:90])
        widest = max(seen, key=lambda n: float(seen[n].std(0).sum()) if len(seen[n]) > 1 else 0.0)
        gates = seen[widest].numpy()
        step = len(wave) / encoder.sample_rate / len(gates)
        bottom.plot((np.arange(len(gates)) + 0.5) * step, gates)
        bottom.set(xlabel="seconds", ylabel=f"gates of layer {widest}")  # the layer whose gates move most
        bottom.legend([str(n) for n in range(shape[1])], fontsize=7, ncols=4, title="expert", title_fontsize=7)
        save(figure, f"gates_{number}.png")
    named = sorted(name for name in conditions if name)[:6]
    if named:
        figure, axes = plt.subplots(1, len(named), figsize=(3.5 * len(named), 4), squeeze=False, layout="constrained")
        means = [conditions[name].mean() for name in named]
        limits = {"vmin": min(float(m.min()) for m in means), "vmax": max(float(m.max()) for m in means)}
        for axis, name, mean in zip(axes[0], named, means):
            picture = heat(axis, mean, name, **limits)
        figure.colorbar(picture, ax=axes[0].tolist(), label="mean gate")
        save(figure, "conditions.png")


# ---- evaluation -------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(parts, feats, lens, rows, cfg):
    """Greedy answers of a batch: list of id lists without the end-of-turn token."""
    spliced = parts.listen(feats, lens, rows, pad_left=True)
    caps = [min(model.token_cap(row["seconds"]), cfg["max_text_length"]) for row in rows]
    if cfg["llm_decoder.use_cache"]:
        return model.greedy_decode(parts.llm, spliced, parts.stop_id, caps)[0]
    embed, answers, alive = parts.llm.get_input_embeddings(), [[] for _ in rows], set(range(len(rows)))
    inputs, mask, position = (spliced[name] for name in ("inputs_embeds", "attention_mask", "position_ids"))
    while alive:  # all positions once more for each token: nothing is kept between them
        hidden = parts.llm.model(inputs_embeds=inputs, attention_mask=mask, position_ids=position,
                                 use_cache=False).last_hidden_state
        chosen = parts.llm.lm_head(hidden[:, -1]).float().argmax(-1)  # (B,)
        for row in sorted(alive):
            token = int(chosen[row])
            if token == parts.stop_id:
                alive.discard(row)
                continue
            answers[row].append(token)
            if model.cut_loop(answers[row]):
                alive.discard(row)
            elif len(answers[row]) >= caps[row]:
                alive.discard(row)
                while model.cut_loop(answers[row], least=2, tokens=2):
                    pass
        inputs = torch.cat([inputs, embed(chosen)[:, None].to(inputs.dtype)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        position = torch.cat([position, position[:, -1:] + 1], dim=1)
    return answers


@torch.no_grad()
def evaluate(parts, utterances, cfg, device, dtype, bad, shared=True):
    """Teacher-forced loss and accuracy, greedy error rates, of all utterances; the processes share them.

    shared  False: every process does all of it, as ZeRO stage 3 needs: all must call the LLM equally often.
    Output  (scores, [{key, reference, text, reason}] in the order of `utterances`).
    """
    rank, world = rank_and_world() if shared else (0, 1)
    order = sorted(range(len(utterances)), key=lambda i: (-utterances[i]["seconds"], i))[rank::world]
    size = cfg["eval_batch_size"]
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    sums, texts = torch.zeros(3, dtype=torch.float64), {}
    for batch, (feats, lens, rows) in zip(batches, read_batches(utterances, batches, parts.encoder, cfg, bad)):
        feats = feats.to(device)
        with mixed(device, dtype):
            ce, right, _ = parts(feats, lens, rows)
            answers = decode(parts, feats, lens, rows, cfg)
        sums += torch.tensor([float(ce), float(right), sum(len(row["ids"]) + 1 for row in rows if row["ids"])])
        for index, row, answer in zip(batch, rows, answers):
            text = "" if row["reason"] else parts.tokenizer.decode(answer, skip_special_tokens=True).strip()
            texts[index] = {"key": row["key"], "reference": row["reference"], "text": text, "reason": row["reason"]}
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, (sums, texts))
        sums = sum(part[0] for part in gathered)
        texts = {index: text for part in gathered for index, text in part[1].items()}
    results = [texts[index] for index in range(len(utterances))]
    scores = {"eval_ce": float(sums[0] / sums[2]), "eval_acc": float(sums[1] / sums[2])}
    return scores | text_scores(results, cfg["task"]), results


def text_scores(results, task):
    """WER and CER, raw and normalised, and the error rate that early stopping watches."""
    pairs = [row["reference"] for row in results], [row["text"] for row in results]
    scores = {f"{name}{suffix}": model.error_rate(*pairs, language, normalize=not suffix)["rate"]
              for name, language in (("wer", "en"), ("cer", "zh")) for suffix in ("_raw", "")}
    scores["error_rate"] = model.error_rate(*pairs)["rate"]  # WER, or CER where the reference is Chinese
    if task == "qa":
        same = [model.normalize_text(said) == model.normalize_text(heard) for said, heard in zip(*pairs)]
        scores["exact_match"] = sum(same) / len(same)
        scores["error_rate"] = 1 - scores["exact_match"]
    return scores


def test(cfg, parts, device, dtype):
    """Score the trained weights on the whole of parquet_dirs."""
    folder = Path(cfg["training.output_dir"])
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json there; training.output_dir must be that of a training run")
    trained = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    identity = find_identity(parts)
    differing = [f"{key} {value!r} (trained with {trained.get(key)!r})" for key, value in
                 ({key: cfg[key] for key in MODEL_KEYS} | identity).items()
                 if trained.get(key) != value and not key.endswith(".name") and key != "steering.num_experts"]
    model.load_steermoe(parts.trained, model.read_weights(folder / "steermoe.pt"), folder / "steermoe.pt")
    if differing:
        raise ValueError(f"{folder}: was trained otherwise: {', '.join(differing)}")
    utterances, left_out = list_utterances(cfg["parquet_dirs"], cfg, parts, filtered=False)
    parts.eval()
    scores, results = evaluate(parts, utterances, cfg, device, dtype, left_out)
    summary = {"n": len(results), "n_left_out": len(left_out), "hours": sum(u["seconds"] for u in utterances) / 3600,
               "test": cfg["parquet_dirs"], "prompt": cfg["textual_prompt"]} | scores
    if rank_and_world()[0] == 0:
        write_lines(folder / "test.jsonl", results)
        write_lines(folder / "bad.jsonl", left_out)
        write_atomic(folder / "test.json", lambda file: file.write(json.dumps(summary, indent=1).encode()))
        print(f"{len(results)} clips, {summary['hours']:.2f} h, {len(left_out)} not heard and scored as empty | "
              + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    return summary


# ---- the run ----------------------------------------------------------------------------------------------------


def checkpoints(folder):
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob("checkpoint-*.pt"))


def open_output(cfg, rank):
    """Make output_dir, or open it again to resume. Output: content of the newest checkpoint, or None."""
    folder = Path(cfg["training.output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    found = checkpoints(folder)
    if not cfg["resume"] and ((folder / "metrics.jsonl").exists() or found):
        raise ValueError(f"{folder}: already holds a run; give another training.output_dir, or resume=true to go on")
    if not found:
        return None  # new, or killed before its first checkpoint
    try:
        state = torch.load(found[-1], map_location="cpu", weights_only=True)
    except Exception as error:  # torn, or a pickle with code in it: weights_only refuses it
        raise ValueError(f"{found[-1]}: not a checkpoint of this script ({type(error).__name__})") from error
    if state.get("format") != 2:
        raise ValueError(f"{found[-1]}: of an earlier version, whose epochs had another order; finish that run with it")
    changed = [f"{k}: {v!r} -> {cfg[k]!r}" for k, v in state["config"].items() if k in cfg and cfg[k] != v]
    if rank == 0:
        print(f"resuming at step {state['step']}; changed: {', '.join(changed) or 'nothing'}")
    return state | {"file": str(found[-1])}


def save_checkpoint(folder, state, limit):
    """checkpoint-STEP.pt; of older ones only the newest `limit` - 1 stay (0: all)."""
    path = folder / f"checkpoint-{state['step']:07d}.pt"
    write_atomic(path, lambda file: torch.save(state, file))
    for old in checkpoints(folder)[:-limit] if limit else []:
        old.unlink()


def find_identity(parts):
    identity = {f"encoder.{key}": value for key, value in parts.encoder.identity.items()}
    return identity | {f"llm.{key}": value for key, value in parts.llm.identity.items()}


def save_results(parts, weights, cfg, folder):
    """steermoe.pt, a plain state dict of what trains, and config.json: what infer.py needs besides encoder and LLM."""
    stacked = cfg["stack_frames"] if cfg["adaptor"] == "stack" else 1
    settings = {key: cfg[key] for key in MODEL_KEYS} | find_identity(parts) | {
        "weights": "steermoe.pt", "llm.prompt": cfg["textual_prompt"], "llm.system": cfg["system_prompt"],
        "adaptor.stack": cfg["pooling_kernel_size"] * stacked}  # encoder frames per LLM position
    write_atomic(folder / "steermoe.pt", lambda file: torch.save(weights, file))
    text = json.dumps({"format": 1} | settings, ensure_ascii=False, indent=1)
    write_atomic(folder / "config.json", lambda file: file.write(text.encode()))


def write_lines(path, rows):
    write_atomic(path, lambda file: file.writelines(json.dumps(r, ensure_ascii=False).encode() + b"\n" for r in rows))


# the same functions as in train_phase1.py and train_phase2.py (tests/test_copies.py)


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


def start_deepspeed(parts, optimizer, cfg):
    """A DeepSpeed engine, or None with a line that says why: then PyTorch's own DDP is used."""
    if not cfg["training.use_deepspeed"]:
        return None
    try:
        import deepspeed
    except ImportError:
        print("training.use_deepspeed: the deepspeed package is not installed; DDP is used")
        return None
    if not cfg["deepspeed_launcher"]:
        print("training.use_deepspeed: not started by the deepspeed launcher; DDP is used")
        return None
    if not cfg["deepspeed_config"]:
        raise ValueError("training.use_deepspeed: give --deepspeed_config, such as configs/deepspeed/stage2.json")
    settings = json.loads(Path(cfg["deepspeed_config"]).read_text(encoding="utf-8"))
    settings |= {"train_micro_batch_size_per_gpu": cfg["training.batch_size"], "gradient_accumulation_steps": 1,
                 "gradient_clipping": cfg["training.gradient_clipping"], "bf16": {"enabled": cfg["training.fp16"]}}
    print("training.use_deepspeed: all gradients are clipped together, steering_gradient_clip does not apply; no "
          "steering analysis")
    # ZeRO gathers a module's weights where the module is called; our encoders also use weights without calling theirs
    encoder = parts._modules.pop("encoder")
    object.__setattr__(parts, "encoder", encoder)  # still parts.encoder, but whole on every process
    return deepspeed.initialize(model=parts, optimizer=optimizer, config=settings)[0]


def trained_state(parts, engine):
    """State dict of what trains, fp32; ZeRO stage 3 has it in pieces, which all processes gather."""
    if engine is None:
        return parts.trained.state_dict()
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parts.trained.parameters())):
        return {name: value.detach().float().clone() for name, value in parts.trained.state_dict().items()}


def main(cfg):
    kind = check_config(cfg)
    device, _ = pick_device(cfg | {"dtype": "fp32"})
    rank, world = rank_and_world()
    dtype = precision(cfg)
    parts = build(cfg, kind, device, dtype)
    if cfg["mode"] == "test":
        summary = test(cfg, parts, device, dtype)
        if dist.is_initialized():
            dist.destroy_process_group()
        return summary
    state, folder = open_output(cfg, rank), Path(cfg["training.output_dir"])
    train, bad = list_utterances(cfg["parquet_dirs"], cfg, parts, filtered=True)
    dev, bad_dev = list_utterances(cfg["eval_dirs"], cfg, parts, filtered=False) if cfg["eval_dirs"] else ([], [])
    left_out, bad = len(bad), bad + bad_dev
    steering = parts.trained.steering
    optimizer = make_optimizer(parts.trained, cfg, device)
    step, epoch, used, best, stale, spent = 0, 0, 0, math.inf, 0, 0.0
    if state:
        model.load_steermoe(parts.trained, state["trained"], state["file"])
    engine = start_deepspeed(parts, optimizer, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    wrapped = engine or parts
    if world > 1 and engine is None:
        wrapped = nn.parallel.DistributedDataParallel(parts, broadcast_buffers=False)
    if state:
        step, epoch, used, best, stale, spent = (
            state[k] for k in ("step", "epoch", "used", "best", "stale", "seconds"))
        if engine is None:
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
        else:
            engine.load_checkpoint(str(folder / "deepspeed"), tag=f"step{step}", load_module_strict=False)
    total = cfg["max_steps"] or cfg["training.epochs"] * len(train_batches(train, cfg, 0))
    metrics, analysis, writer = folder / "metrics.jsonl", folder / "steering.jsonl", None
    if rank == 0:
        write_atomic(folder / "config.yaml", lambda file: file.write(yaml.safe_dump(cfg, sort_keys=False).encode()))
        for path in (metrics, analysis):
            trim_metrics(path, step)
        writer = SummaryWriter(cfg["training.logging_dir"] or folder, purge_step=step + 1)
        print_start(cfg, parts, train, dev, left_out, total, device, dtype, world)
    analysed = rank == 0 and engine is None and steering is not None and cfg["log_steering_analysis"]
    parts.train()  # frozen parts stay in eval: model.freeze
    batches = stream(train, parts.encoder, cfg, epoch, used, bad)
    window, started, skipped = new_window(), time.time(), 0
    bar = tqdm(total=total, initial=step, unit="step", disable=rank != 0 or None)
    stopped = cfg["use_early_stopping"] and stale >= cfg["early_stopping_patience"]
    while step < total and not stopped:
        lr = set_learning_rates(optimizer, step, total, cfg)
        epoch, used, feats, lens, rows = next(batches)
        watched = analysed and ((step + 1) % cfg["steering_log_interval"] == 0 or step + 1 == total)
        if watched:
            steering.watch = GateUsage(*steering.vectors.shape[:2])
        labels = sum(len(row["ids"]) + 1 for row in rows if row["ids"])
        count = torch.tensor(float(labels))  # a tensor, so that nobody waits for what other processes count
        if world > 1:
            count = model.upload(count, device)
            dist.all_reduce(count)
        with mixed(device, dtype):
            ce, right, positions = wrapped(model.upload(feats, device), lens, rows)
        loss = ce / count.clamp(min=1) * world  # DDP averages over processes, we want the sum
        if engine is not None:
            engine.backward(loss)
            engine.step()
            norms = {"norm": engine.get_global_grad_norm() or 0.0}
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)  # clip real, not scaled, gradients
            norms = clip_gradients(parts.trained, cfg, finite=not scaler.is_enabled())
            before = scaler.get_scale()
            scaler.step(optimizer)  # fp16: skipped on overflow
            scaler.update()
            skipped += scaler.get_scale() < before
            optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.update(1)
        last = step == total
        for name, value in (("ce", ce.detach()), ("right", right), ("labels", labels), ("tokens", positions),
                            ("steps", 1), ("audio_s", sum(row["seconds"] for row in rows))):
            window[name] += value
        if watched:
            usage, steering.watch = steering.watch, None
            log_steering(analysis, writer, step, usage, steering)
        if len(unreadable := [row for row in bad if not row["readable"]]) > cfg["max_bad"]:
            write_lines(folder / "bad.jsonl", bad)
            raise ValueError(f"{len(unreadable)} clips cannot be read, more than max_bad={cfg['max_bad']}; the last is "
                             f"{unreadable[-1]['key']}: {unreadable[-1]['reason']}")
        if rank == 0 and (step % cfg["logging_steps"] == 0 or last):
            log_window(window, step, total, lr, norms, skipped, metrics, writer, bar)
            window = new_window()
        if dev and (step % cfg["eval_steps"] == 0 or last):
            scores, results = evaluate(parts, dev, cfg, device, dtype, bad, shared=engine is None)
            stale = 0 if scores["error_rate"] < best else stale + 1
            stopped = cfg["use_early_stopping"] and stale >= cfg["early_stopping_patience"]
            weights = trained_state(parts, engine) if not stale else None
            if rank == 0:
                log_metrics(metrics, writer, step, scores)
                tqdm.write(f"  eval {step}: " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))
                for row in results[:3]:
                    tqdm.write(f"    said  {row['reference']}\n    heard {row['text']}")
                if weights is not None:
                    save_results(parts, weights, cfg, folder)
                if stopped:
                    tqdm.write(f"stopping early at step {step}: {stale} evaluations without a better error rate")
            best = min(best, scores["error_rate"])
        if step % cfg["save_steps"] == 0 or last or stopped:
            weights = trained_state(parts, engine)
            if engine is not None:
                engine.save_checkpoint(str(folder / "deepspeed"), tag=f"step{step}", exclude_frozen_parameters=True)
            if rank == 0:
                save_checkpoint(folder, {
                    "format": 2, "trained": weights, "optimizer": optimizer.state_dict() if engine is None else {},
                    "scaler": scaler.state_dict(), "step": step, "epoch": epoch, "used": used, "best": best,
                    "stale": stale, "config": cfg, "identity": find_identity(parts),
                    "seconds": spent + time.time() - started}, cfg["save_total_limit"])
                if not dev:
                    save_results(parts, weights, cfg, folder)
    bar.close()
    if rank == 0:
        write_lines(folder / "bad.jsonl", bad)
        if analysed:
            plot_steering(parts, dev or train, cfg, device, dtype, folder)
        print(f"done: {step} steps, best {best:.4f}, {spent + time.time() - started:.0f} s -> {folder}")
    if dist.is_initialized():
        dist.destroy_process_group()


def new_window():
    return {"ce": 0.0, "right": 0.0, "labels": 0, "tokens": 0, "steps": 0, "audio_s": 0.0, "started": time.time()}


def log_window(window, step, total, lr, norms, skipped, metrics, writer, bar):
    """One line per interval: losses averaged over the interval."""
    values = {"ce": float(window["ce"]) / max(1, window["labels"]),
              "acc": float(window["right"]) / max(1, window["labels"]),
              "audio_s_per_s": window["audio_s"] / (time.time() - window["started"]),
              "tokens": window["tokens"] / window["steps"], "skipped": skipped}
    values |= {f"lr_{name}": value for name, value in lr.items()} | norms
    log_metrics(metrics, writer, step, values)
    bar.set_postfix(ce=f"{values['ce']:.3f}")
    memory = f" {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if torch.cuda.is_available() else ""
    rates = " ".join(f"{name} {value:.2e}" for name, value in lr.items())
    tqdm.write(f"{step:6d}/{total} ce {values['ce']:7.4f} acc {values['acc']:.3f} lr {rates} "
               f"norm {float(norms['norm']):7.3f} {values['audio_s_per_s']:7.1f} audio s/s{memory}")


def print_start(cfg, parts, train, dev, left_out, total, device, dtype, world):
    """Everything derived, once, before the first step."""
    hours, cut = sum(row["seconds"] for row in train) / 3600, sum(row["cut"] for row in train)
    print(f"train {len(train)} clips, {hours:.2f} h an epoch, {left_out} left out (bad.jsonl), {cut} cut to "
          f"max_prompt_tokens; dev {len(dev)} clips | {total} steps of {cfg['training.batch_size']} clips x {world}")
    for name, part in parts.named_children():
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in part.parameters()]  # ds_numel: of ZeRO 3
        trains = sum(size for size, trained in sizes if trained)
        print(f"  {name}: {trains:,} trainable, {sum(size for size, _ in sizes) - trains:,} frozen")
    before, after = train[0]["prompts"]
    print(f"prompt: {parts.tokenizer.decode(before)!r} SPEECH {parts.tokenizer.decode(after)!r}")
    print(f"encoder {parts.encoder.identity['name']}, LLM {parts.llm.identity['name']}, device {device}, {dtype}, "
          f"torch {torch.__version__}, seed {cfg['seed']}", flush=True)


if __name__ == "__main__":
    sys.argv[1:] = split_arguments(sys.argv[1:])
    run_main(main, DEFAULTS, __doc__)
