"""What the scripts share: all that would be silently wrong if two copies of it differed.

    wave (N,) 16 kHz -> features (T, F) -> encoder (B, T, W) -> AudioAdaptor (B, S, D)
                     -> splice into the prompt -> LLM (B, L, D) -> text

Data order, losses, schedule, loop and checkpoints stand in the scripts, where a reader looks.
B batch, N samples, T encoder frames, S adaptor positions, L LLM positions, W encoder width, D LLM
width, V vocabulary. `enc (B, T, W)` travels with `enc_lens (B,)`, which stays on the CPU: to ask a
GPU for a length is to wait for all that it still has to do. A bool mask is True where data is real.
"""

import contextlib
import difflib
import errno
import fcntl
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import threading
import unicodedata
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchaudio
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

FORMAT = 3  # of caches, checkpoints and config.json; others are refused
IGNORE = -100  # label that cross-entropy skips, as in transformers
AUDIO = -1  # among token ids: here stands a recording
NULL = ("null", "~")  # YAML's
AUDIO_MARK = "<|earshot-audio|>"  # stands for the audio in a chat template; never tokenised
PLAIN_MARK = "\ue000"  # around text that only looks like a special token; never tokenised
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOTDIR)


class UserError(Exception):
    """What the user can mend: one line, exit status 2. All other exceptions keep a traceback."""


class AudioError(UserError):
    """One clip that cannot be used; runs name and count such clips, and go on."""


# ---- configuration ----------------------------------------------------------


def load_config(arguments, defaults, aliases=None, optional=(), absent=()):
    """`[config.yaml] key=value ...` over the YAML text `defaults`; later ones win.

    Keys may be nested or dotted, in files too; `--config FILE`, `--config-path DIR --config-name
    NAME` and `++key=value` are taken, `~key` brings a default back. Where the default is text, a
    value stays as typed; where it is {}, any keys may stand below.
    aliases   {another spelling: key}.  optional: sections that `null` switches off; absent: those
    of them that are off until one of their keys is given.
    Output  DictConfig, read as `cfg.optim.lr`; keys whose default is ??? were given.
    Raises  UserError naming file or argument, and the nearest key for one that is unknown.
    """
    config, aliases = OmegaConf.create(defaults), aliases or {}
    text = "\n".join(arguments)  # Hydra's two options name one file
    named = dict(re.findall(r"^--config-(path|name)[=\n](.*)$", text, re.M))
    if "name" in named:
        rest = re.sub(r"^--config-(?:path|name)[=\n].*$", "", text, flags=re.M).split("\n")
        name = f"{named.get('path', '.')}/{named['name'].removesuffix('.yaml')}.yaml"
        arguments = [name, *filter(None, rest)]
    known, off = flatten(OmegaConf.to_container(config)), set(absent)
    free = tuple(f"{key}." for key, default in known.items() if default == {})  # names of all kinds
    sections = {key[: dot.end()] for key in known for dot in re.finditer(r"\.", key)}
    try:
        for argument in arguments:
            if argument == "--config":
                continue  # the file behind it is read as any other
            argument = argument.removeprefix("--config=").lstrip("+")
            key, equals, text = argument.partition("=")
            if (equals or key[:1] == "~") and not os.path.isfile(argument):
                # Path.is_file would refuse a long prompt
                where, given = f"argument {argument}", {key: text}
            else:
                where, given = argument, flatten(read_yaml(argument), where=f"{argument}: ")
            for key, value in given.items():
                key = aliases.get(key, key)
                off -= {section for section in off if key.startswith(f"{section}.")}
                if key in optional and value in NULL:
                    off.add(key)
                elif key[:1] == "~" and key[1:] in optional:
                    off.add(key[1:])
                elif key[:1] == "~" and key[1:].startswith(free):
                    section, _, name = key[1:].rpartition(".")
                    OmegaConf.select(config, section).pop(name, None)
                elif key[:1] == "~" and key[1:] in known:
                    OmegaConf.update(config, key[1:], known[key[1:]], merge=False)
                elif key.startswith(free):
                    OmegaConf.update(config, key, value, force_add=True)
                elif key in known:
                    OmegaConf.update(config, key, convert(value, known[key], f"{where}: {key}"))
                elif where == argument and value in ("null", "") and f"{key}." in sections:
                    continue  # `section:` with nothing below it, in a file
                else:
                    nearest = difflib.get_close_matches(key, known, 1, 0.0)[0]
                    raise UserError(f"{where}: unknown key {key!r}; did you mean {nearest!r}?")
        for section in off:
            OmegaConf.update(config, section, None)
        config = OmegaConf.to_container(config, resolve=True)  # ${...}
    except OmegaConfBaseException as error:
        raise UserError(f"configuration: {str(error).splitlines()[0]}") from error
    values = flatten(config)
    required = [key for key, default in known.items() if default == "???"]
    if missing := [key for key in required if values.get(key) in ("???", "", "[]", [])]:
        raise UserError(f"required key not given: {', '.join(missing)}")
    return OmegaConf.create(config)


def read_yaml(path):
    """A YAML file as nested dict, scalars as text: 0571, No and 1e-4 are left to `convert`."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            tree = yaml.load(file, NoDoubleKeys) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected `key: value` lines")
    return tree


class NoDoubleKeys(yaml.BaseLoader):
    """Scalars stay text; a key given twice is an error, where PyYAML silently keeps the last."""

    def construct_scalar(self, node):
        return node.value if node.value or node.style else "null"  # of `key:`, but not `key: ""`

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                twice = f"{key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=twice, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def flatten(tree, prefix="", where=""):
    """Nested or dotted keys -> {dotted key: value}."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, dict) and value
        found = flatten(value, f"{name}.", where) if nested else {name: value}
        if twice := flat.keys() & found.keys():
            raise UserError(f"{where}{min(twice)} is given twice, nested and dotted")
        flat |= found
    return flat


def convert(value, default, where):
    """Bring what the user wrote to its default's type; where that is null or ???, it stays text."""
    if isinstance(default, list):
        kind, items = default[0] if default else "", [] if value in NULL else as_list(value)
        return [convert(item, kind, where) for item in items]
    if default is None or isinstance(default, str) or "${" in value:
        nothing = None if default is None else ""
        return nothing if value in NULL else value
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    try:
        return words[value.lower()] if isinstance(default, bool) else type(default)(value)
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{where}: expected {type(default).__name__}, got {value!r}") from None


def as_list(value):
    """`a.jsonl, b.jsonl`, `[a, b]` or a list -> list without empty parts."""
    parts = value.strip("[] ").split(",") if isinstance(value, str) else value
    parts = [part.strip() if isinstance(part, str) else part for part in parts]
    return [part for part in parts if part != ""]


def at_least(minimum, cfg, *keys):
    """UserError if the value of one of the dotted keys is below `minimum`."""
    for key in keys:
        if (value := OmegaConf.select(cfg, key)) < minimum:
            raise UserError(f"{key}: has to be at least {minimum}, got {value}")


def one_of(allowed, cfg, key):
    """UserError if the value of a dotted key is not among those allowed."""
    if (value := OmegaConf.select(cfg, key)) not in allowed:
        raise UserError(f"{key}: expected one of {', '.join(allowed)}; got {value!r}")


def marked(defaults, mark):
    """{dotted key: what stands behind the mark} of the keys whose comment in DEFAULTS has it."""
    found, sections = {}, []
    for line in defaults.splitlines():
        setting, _, comment = line.partition("# ")
        name, _, value = setting.strip().partition(":")
        sections[(len(line) - len(line.lstrip())) // 2 :] = [name]
        if comment.startswith(mark) and comment[1:2] in ("", " ", ","):  # not "-1: ..."
            names = yaml.safe_load(value) if name == "<<" else [name]
            found |= {".".join([*sections[:-1], name]): comment[2:] for name in names}
    return found


def check_marked(cfg, defaults, say, verbose, all_keys=False):
    """Say which keys change nothing ("- why" in DEFAULTS): those given, with `verbose` all of them,
    with `all_keys` what every key does. UserError where one of a single value ("=") has another."""
    default, nothing = OmegaConf.create(defaults), marked(defaults, "-")
    single = marked(defaults, "=")
    for key, value in flatten(OmegaConf.to_container(cfg)).items():
        usual = OmegaConf.select(default, key)
        if key in nothing and (verbose or value != usual):
            say(f"note: {key}={value} changes nothing: {nothing[key]}")
        elif key in single and value != usual:
            raise UserError(f"{key}: only {usual!r} is implemented, got {value!r} {single[key]}")
        elif verbose and all_keys and key not in nothing:
            say(f"{key}={value}{' is the only value' if key in single else ''}")


def run_main(main, defaults, doc, batch_key="batch_size", **spelling):
    """Command line of a script: --help prints what it does and every key; --check goes as
    check_only to a `main` that knows it; errors in one line."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{doc.strip()}\n\nKeys and their defaults:\n{defaults}")
        return
    # TensorBoard writes in a thread; what stops it there is raised here, too
    threading.excepthook = lambda args: no_room(args.exc_value) or threading.__excepthook__(args)
    given, checks = sys.argv[1:], "check_only" in inspect.signature(main).parameters
    rest = [argument for argument in given if argument != "--check" or not checks]
    try:
        cfg = load_config(rest, defaults, **spelling)
        main(cfg, **({"check_only": len(rest) < len(given)} if checks else {}))
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except KeyboardInterrupt:
        sys.exit("interrupted; what was saved is kept")
    except UserError as error:
        message = str(error)
    except torch.OutOfMemoryError as error:
        message = f"out of memory, lower {batch_key} ({str(error).split('. ')[0]})"
    except Exception as error:
        if not (reason := no_room(error)):
            raise
        message = f"{reason}; what was saved is whole"
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def no_room(error):
    """What an exception says of a full or read-only disk that lies behind it; else ""."""
    while error is not None:
        full = "Not enough disk space" in str(error)  # datasets' own, without a number
        if isinstance(error, OSError) and (error.errno in NO_ROOM or full):
            where = f"{error.filename}: " if error.filename else ""
            return where + (error.strerror or str(error).split(".")[0])
        error = error.__cause__ or error.__context__
    return ""


# ---- processes and files ----------------------------------------------------


def start(device="auto", dtype="auto", wait=timedelta(minutes=10), without_bf16="dtype=fp32"):
    """Join torchrun's group, if it started this process.

    Input   dtype: auto (bf16 on a GPU), fp32, bf16 or fp16; wait: for another process, at most;
            without_bf16: what a script's user sets on a GPU that has no bf16.
    Output  device, dtype of frozen weights and autocast, rank, world size.
    """
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in ("auto", *dtypes):
        raise UserError(f"dtype: expected auto, {', '.join(dtypes)}, got {dtype!r}")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"device: expected auto, cpu or cuda, got {device!r}")
    on_gpu = device.startswith("cuda") or device == "auto" and torch.cuda.is_available()
    if on_gpu and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch sees no GPU; set device=cpu")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=wait)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not on_gpu:
        return torch.device("cpu"), dtypes.get(dtype, torch.float32), rank, world
    local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(device if ":" in device else local)
    torch.cuda.set_device(device)
    if dtype in ("auto", "bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name()} has no bf16; set {without_bf16}")
    # what stays fp32 beside half precision may be rounded to TF32
    torch.set_float32_matmul_precision("highest" if dtype == "fp32" else "high")
    # cuDNN's attention plans anew for every shape, and has given NaN gradients under a mask
    torch.backends.cuda.enable_cudnn_sdp(False)
    return device, dtypes.get(dtype, torch.bfloat16), rank, world


def save(path, content):
    """Write by the file's ending: .pt a state dict, .json, .jsonl a list of rows; else text."""
    ending = Path(path).suffix
    if ending == ".pt":
        return save_atomic(path, lambda file: torch.save(content, file))
    if ending == ".json":
        content = json.dumps(content, ensure_ascii=False, indent=1)
    elif ending == ".jsonl":
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    return save_atomic(path, lambda file: file.write(content.encode()))


def save_atomic(path, write):
    """`write(file)`, fsync, rename: after a kill or with a full disk the old file is whole."""
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a disk that is full
        reason = getattr(error, "strerror", None) or f"{error}; is the disk full?"
        raise UserError(f"{path}: not written ({reason}); what was there is whole") from error
    finally:
        temporary.unlink(missing_ok=True)


def append(path, rows):
    """Add lines to a .jsonl file."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; the lines before are kept") from error


def read_weights(path, mmap=False):
    """A plain state dict, itself or under "state_dict". UserError for a torn file, or for code."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    refuse_pointer(path)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        return weights.get("state_dict", weights)
    except Exception as error:  # torch and pickle raise many types; the remedy is the same
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise UserError(f"{path}: not a plain state dict, not loaded ({reason})") from error


def refuse_pointer(path):
    """UserError where git has put the place of a large file instead of the file itself."""
    with open(path, "rb") as file:
        if file.read(19) == b"version https://git":
            raise UserError(f"{path}: a git-lfs pointer in place of the file; run git lfs pull")


def load_weights(module, weights, where):
    """Load a state dict of exactly this module; UserError says what does not fit."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{where}: does not fit the {type(module).__name__}: {reason}") from error


def hash_text(value):
    """Short sha256 of anything JSON can write: the identity of a list or a setting."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def hash_tensors(tensors):
    """Short sha256 over names, shapes and bytes of a state dict: the identity of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def lock_folder(folder):
    """Make a folder, or refuse one that another process writes to; ends with the process."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = os.open(Path(folder) / "lock", os.O_RDWR | os.O_CREAT)  # stays open: it is the lock
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} of {os.uname().nodename}".encode())
    except BlockingIOError as error:
        owner = os.read(file, 200).decode()
        raise UserError(f"{folder}: {owner} writes to it; wait, or give another one") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror})") from error
    for left in Path(folder).glob("*.tmp[0-9]*"):  # of a killed process; this one is alone here
        left.unlink()


def check_identity(found, wanted, where):
    """UserError where a value in {section: {key: value}} that both have differs; a name may."""
    for section in wanted.keys() & found.keys():
        then, now = found[section], wanted[section]
        for key in sorted(then.keys() & now.keys() - {"name"}):
            if then[key] != now[key]:
                change = f"{key} was {then[key]}, is {now[key]}"
                raise UserError(f"{where}: was made with another {section}: {change}")


def open_run(folder, cfg, identity, resume, rank, world):
    """Make a run's folder, or open it again. Output: content of last.pt, or None for a new run.

    Raises  UserError if the folder is in use, holds a run (without resume), or one with another
            identity or number of processes: the order of its data would change.
    """
    last, metrics = Path(folder) / "last.pt", Path(folder) / "metrics.jsonl"
    if rank == 0:
        lock_folder(folder)
    if not resume and (last.exists() or metrics.exists()):
        raise UserError(f"{folder}: holds a run; give another folder, or resume it")
    state = read_weights(last) if last.exists() else None
    if state is not None:
        if state.get("format") != FORMAT:
            raise UserError(f"{last}: made by an earlier layout; finish that run with its own code")
        check_identity(state["identity"], identity, last)
        if state["world"] != world:
            raise UserError(f"{last}: is of {state['world']} processes, this run has {world}")
        then, now = flatten(state["config"]), flatten(OmegaConf.to_container(cfg))
        changed = [f"{k}: {then.get(k)!r} -> {v!r}" for k, v in now.items() if then.get(k) != v]
        if rank == 0:
            print(f"resuming at step {state['step']}; changed: {', '.join(changed) or 'nothing'}")
    if rank == 0:
        for path in Path(folder).glob("*.jsonl"):  # a kill or a full disk cuts a line
            whole, newline, cut = path.read_bytes().rpartition(b"\n")
            if cut:
                os.truncate(path, len(whole + newline))
        save(Path(folder) / "config.yaml", OmegaConf.to_yaml(cfg))
    return state


def log_metrics(folder, writer, step, values):
    """Show a row, append it to metrics.jsonl (of a step, the last one counts) and TensorBoard;
    writer: a SummaryWriter, or None in all processes but one, which then do nothing."""
    values = {name: float(f"{float(value):.7g}") for name, value in values.items()}
    check_gradient(values.get("grad_norm", 0.0), step)
    if writer is None:
        return
    tqdm.write(f"{step:7d}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
    append(Path(folder) / "metrics.jsonl", [{"step": step} | values])
    for name, value in values.items():
        writer.add_scalar(name, value, step)
    writer.flush()  # what waits in its thread would be lost at the end


def keep_best(kept, scores, conf, weights, folder, publish):
    """step=N.pt of the save_top_k best, by exp_manager's checkpoint_callback_params, and
    `publish(weights)` where they are the best of all; publish: None in all processes but one.

    Output  [[score, file]], the lowest first: what to give next time.
    """
    if not conf.create_checkpoint_callback:
        return kept
    conf = conf.checkpoint_callback_params
    sign, score = 1 if conf.mode == "min" else -1, scores.get(conf.monitor)
    score = math.inf if score is None else sign * score  # the worst, where there is none

    def written(match):
        found = match[1] in scores  # one of an agent that never answers is missing
        return f"{match[1]}={format(scores[match[1]], match[2] or '') if found else 'none'}"

    name = re.sub(r"\{(\w+)(?::([^}]*))?\}", written, conf.filename) + ".pt"
    new = sorted([*kept, [score, name]])[: conf.save_top_k if conf.save_top_k >= 0 else None]
    if publish is not None:
        if score < min([score for score, _ in kept], default=math.inf):
            publish(weights)
        if [score, name] in new:
            save(folder / name, weights)
        for old in {file for _, file in kept} - {file for _, file in new} - {""}:
            (folder / old).unlink(missing_ok=True)
    return new or [[min(score, *(s for s, _ in kept)), ""]]


def note_dropped(folder, rows, known, most):
    """Name rows with a reason (key, where), once; UserError if they are more than max_dropped."""
    for row in rows:
        if row["reason"] and row["key"] not in known:
            known.add(row["key"])
            append(folder / "dropped.jsonl", [{k: row[k] for k in ("key", "where", "reason")}])
            if len(known) > most:
                last = f"the last is {row['where']}: {row['reason']}"
                raise UserError(f"more than max_dropped={most} cannot be heard; {last}")


def check_gradient(norm, step):
    """Stop where a gradient is not finite, before a checkpoint is made of it."""
    if not math.isfinite(norm):
        raise UserError(f"step {step}: the gradient is not finite; lower the rate, then resume")


def due(step, every, total):
    """True at every so many steps (0: never) and at the last one."""
    return step == total or bool(every) and step % every == 0


# ---- audio ------------------------------------------------------------------

# first bytes of WAV, RF64, W64, FLAC, AIFF, AU, SPHERE and CAF, which soundfile reads; the rest is
# left to FFmpeg, which distorts the ADPCM of telephones
PCM_MARKS = (b"RIFF", b"RIFX", b"RF64", b"riff", b"fLaC", b"FORM", b".snd", b"NIST", b"caff")
# FFmpeg's names of formats that say how long they are; of others it guesses by their bit rate
STATED = ("wav", "flac", "aiff", "caf", "matroska", "mov", "asf", "wv", "tta", "ape")


@contextlib.contextmanager
def open_source(source):
    """A binary file of a path, of bytes, or of {bytes, path} of a data set.

    Whatever a file system or a decoder raises inside is an AudioError: it is this one clip.
    """
    if isinstance(source, dict):
        source = source["path"] if source.get("bytes") is None else source["bytes"]
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            yield file
    except AudioError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise AudioError(f"not readable as audio ({reason})") from error


def open_pcm(file):
    """A soundfile.SoundFile, or None for what is FFmpeg's. AudioError if it is not whole."""
    mark, _ = file.read(4), file.seek(0)
    try:
        audio = soundfile.SoundFile(file) if mark in PCM_MARKS else None
    except (soundfile.SoundFileError, TypeError):  # TypeError: of a .raw
        return None
    # a recorder that was killed leaves 0 frames in the header, a FLAC into a pipe has no number
    if not audio or not 0 < audio.frames < 2**60:
        return None
    frames, notes = audio.frames, audio.extra_info
    # libsndfile notes chunks shorter than promised; a writer into a pipe promises 2 or 4 GB
    sizes = r"(?:data|SSND|Data Size|riff|Riff size)\s*: (\d+) \(should be (\d+)\)"
    if any(int(real) < int(said) < 0x7FFFF000 for said, real in re.findall(sizes, notes)):
        raise AudioError(f"truncated, {frames} samples, less than its header says")
    behind = r"(?s)Length : (\d+).*Unknown chunk marker \(\w+\) at position (\d+)\. Exit"
    if (found := re.search(behind, notes)) and int(found[2]) < 0.9 * int(found[1]):
        raise AudioError(f"goes on behind the {frames} samples of its header; mend that")
    return audio


@contextlib.contextmanager
def open_ffmpeg(file):
    """Container, its first audio stream, and their duration by FFmpeg: said, guessed or 0."""
    import av

    file.seek(0)  # and no other file is opened that it may refer to
    with av.open(file, options={"protocol_whitelist": "none"}) as container:
        if not container.streams.audio:
            raise AudioError("not readable as audio (no sound in it)")
        stream, film = container.streams.audio[0], container.streams.video
        said = (container.duration or 0) / 1e6 if not film else 0.0  # it may outlast its sound
        said = float(stream.duration * stream.time_base) if stream.duration else said
        yield container, stream, said


def between(start, end, rate):
    """The samples from `start` to `end` seconds (None: the end), as a slice."""
    return slice(round(start * rate), None if end is None else round(end * rate))


def read_samples(source, start=0.0, end=None):
    """Samples (N, channels) float32 from `start` to `end` seconds, and their rate."""
    with open_source(source) as file:
        if (audio := open_pcm(file)) is None:
            if start or end is not None:
                note("a part of a compressed recording costs the decoding of all; of a FLAC not")
            samples, rate = read_ffmpeg(file)
            return samples[between(start, end, rate)], rate
        rate = audio.samplerate
        first, last, _ = between(start, end, rate).indices(audio.frames)
        skipped = audio.seek(first) if audio.seekable() else 0  # GSM and its like are not
        samples = audio.read(max(0, last - skipped), dtype="float32", always_2d=True)
        if len(samples) < last - skipped:
            raise AudioError(f"truncated, {len(samples)} of {last - skipped} samples")
        return samples[first - skipped :], rate


def read_ffmpeg(file):
    """All samples of a file's first audio stream, (N, channels) float32, and their rate."""
    import av

    parts = []
    with open_ffmpeg(file) as (container, stream, said):
        name = container.format.name.split(",")[0]
        if name not in STATED:
            said = mp3_seconds(file, stream.rate) if name == "mp3" else 0.0
        resampler = av.AudioResampler("flt")  # of any sample format
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:  # FFmpeg's own tools go on, too
                continue
            for out in (out for frame in frames for out in resampler.resample(frame)):
                parts.append(out.to_ndarray().reshape(-1, out.layout.nb_channels))
                rate = out.sample_rate
    if not parts:
        raise AudioError("holds no samples")
    samples = np.concatenate(parts)
    if len(samples) < 0.9 * said * rate or name == "ogg" and ogg_is_cut(file):
        raise AudioError(f"truncated, {len(samples) / rate:.2f} s are left")
    return samples, rate


def mp3_seconds(file, rate):
    """Duration of an mp3 by its first frame, 0 where that says nothing; FFmpeg would guess."""
    place, _ = file.tell(), file.seek(0)
    head = file.read(10)  # of ID3: its size is in 4 x 7 bits
    size = sum((byte & 127) << 7 * n for n, byte in enumerate(reversed(head[6:10])))
    file.seek(size + 10 if head[:3] == b"ID3" else 0)
    number = rb"(?s)(?:(?:Xing|Info)...[\1\3\5\7\x09\x0b\x0d\x0f]|VBRI.{10})(....)"
    found, _ = re.search(number, file.read(2048)), file.seek(place)
    frames = int.from_bytes(found[1], "big") if found else 0
    return frames * (1152 if rate >= 32000 else 576) / rate


def ogg_is_cut(file):
    """True if an Ogg file's last page is torn, or does not say that it is the last one."""
    file.seek(max(0, file.seek(0, io.SEEK_END) - 70000))  # a page has at most 65,307 bytes
    tail = file.read()
    page = tail[tail.rfind(b"OggS") :]
    table = page[27 : 27 + page[26]] if len(page) > 27 else b""
    return not table or not page[5] & 4 or len(page) < 27 + len(table) + sum(table)


def load_audio(source, rate, start=0.0, end=None, channel="mix"):
    """Read one clip as mono float32 at `rate`: (N,); of channel="split" (channels, N).

    Input   source: path, bytes, {bytes, path} or {array, sampling_rate}; any rate; start, end: in
            seconds; channel: a number, a side (A or B), mix (the mean) or split.
    Raises  AudioError if it is missing, empty, truncated, not finite, not audio or too loud.
    """
    if isinstance(source, dict) and source.get("array") is not None:
        samples, own_rate = np.asarray(source["array"]), int(source["sampling_rate"])
        scale = {"int16": 2.0**15, "int64": 2.0**15, "int32": 2.0**31}  # int64: a list of numbers
        samples = (samples / scale.get(samples.dtype.name, 1.0)).astype(np.float32)[:, None]
        samples = samples[between(start, end, own_rate)]
    else:
        samples, own_rate = read_samples(source, start, end)
    if not len(samples):
        raise AudioError("holds no samples")
    peak = max(float(samples.max()), -float(samples.min()))
    if not math.isfinite(peak):
        raise AudioError("holds NaN or infinite samples")
    if peak > 64:  # a float file may go a little over 1
        scale = 2**15 if peak < 2**16 else 2**31
        raise AudioError(f"its samples reach {peak:.0f}, the scale of integers: divide by {scale}")
    name = source if isinstance(source, str | Path) else "a clip"
    samples = pick_channel(samples, channel, name)
    return resample(torch.from_numpy(samples), own_rate, rate)


@functools.lru_cache(10000)
def note(text):
    """Say something about a clip, once in a process."""
    tqdm.write(text, file=sys.stderr)


def pick_channel(samples, channel, name):
    """(N, channels) -> (N,): the one of a number or side, or their mean; (channels, N) of split."""
    count = samples.shape[1]
    if channel == "split":
        return np.ascontiguousarray(samples.T)
    if channel in ("A", "B"):  # sides of a call, which may be files of their own
        channel = min("AB".index(channel), count - 1)
    if channel == "mix":
        mono = samples.mean(axis=1) if count > 1 else samples[:, 0]
        if count != 2 or mono @ mono >= 1e-4 * np.vdot(samples, samples):  # their energies
            return mono
        note(f"{name}: its two channels cancel each other, the first one is taken")
        channel = 0
    if not 0 <= int(channel) < count:
        raise AudioError(f"has {count} channels, none of number {channel}")
    return np.ascontiguousarray(samples[:, int(channel)])


def load_clip(row, rate, channel="mix"):
    """load_audio of a manifest's row, which may name its part of the recording, and a channel."""
    source = row["source"] if row.get("audio") is None else row["audio"]
    start, end = row.get("start") or 0.0, row.get("end")
    wave = load_audio(source, rate, start, end, row.get("channel") or channel)
    said = row.get("seconds") or row.get("duration") if end is None else end - start
    if said and abs(wave.shape[-1] / rate - said) > 0.1:
        found = f"{wave.shape[-1] / rate:.2f} s read, {said:.2f} s expected"
        if end is not None:
            raise AudioError(f"{found}: the recording ends before its segment")
        note(f"{row['key']}: {found}")
    return wave


def audio_seconds(source, decode=True):
    """Duration: by the header where it can be believed, else by decoding (or FFmpeg's guess)."""
    if isinstance(source, dict) and source.get("array") is not None:
        return len(source["array"]) / source["sampling_rate"]
    with open_source(source) as file:
        if audio := open_pcm(file):
            return audio.frames / audio.samplerate
        if not decode:
            with open_ffmpeg(file) as (_, _, said):
                return said
        samples, rate = read_ffmpeg(file)
        return len(samples) / rate


def clip_seconds(row, decode=True):
    """Duration of a manifest's row: of its part, by its own field, or audio_seconds."""
    start, end = row.get("start") or 0.0, row.get("end")
    if end is not None or row.get("duration"):
        return row["duration"] if end is None else end - start
    whole = audio_seconds(row["source"] if row.get("audio") is None else row["audio"], decode)
    return max(0.0, whole - start)


def resample(wave, rate, new_rate):
    """Resample the last axis by torchaudio's equivalent of librosa's `kaiser_best`: images above
    the old Nyquist frequency, as of 8 kHz speech in a 16 kHz front end, stay below -100 dB."""
    if rate == new_rate:
        return wave
    if max(rate, new_rate) // math.gcd(rate, new_rate) > 2000:  # the filters would take gigabytes
        raise AudioError(f"{rate} Hz to {new_rate} Hz: convert the file to a usual rate first")
    out = wave.new_empty(*wave.shape[:-1], -(-wave.shape[-1] * new_rate // rate))
    for minute, first in enumerate(range(0, wave.shape[-1], 60 * rate)):  # two hours at once: 5 GB
        before = min(first, rate)  # a second on either side, more than the filter reaches
        part = torchaudio.functional.resample(
            wave[..., first - before : first + 61 * rate], rate, new_rate,
            lowpass_filter_width=64, rolloff=0.9475937167399596,
            resampling_method="sinc_interp_kaiser", beta=14.769656459379492,
        )[..., before * new_rate // rate :]  # fmt: skip
        place = out[..., minute * 60 * new_rate : (minute + 1) * 60 * new_rate]
        place.copy_(part[..., : place.shape[-1]])
    return out


def change_speed(wave, factor, rate):
    """Kaldi's speed perturbation: 1.1 plays 10 % faster and higher. (N,) -> (N / factor,)."""
    return wave if factor == 1.0 else resample(wave, round(rate * factor / 100) * 100, rate)


def hear_speech(wave, rate, max_s=math.inf):
    """Where silero-vad hears speech, in samples: [(first, end)], at most max_s if it can."""
    threads = torch.get_num_threads()
    from silero_vad import get_speech_timestamps, load_silero_vad  # its weights lie in the package

    torch.set_num_threads(threads)  # importing it sets 1 for the whole process
    vad = load_silero_vad()
    found = get_speech_timestamps(wave, vad, sampling_rate=rate, max_speech_duration_s=max_s)
    return [(span["start"], span["end"]) for span in found]


# ---- features of SenseVoice and Fun-ASR-Nano --------------------------------

LFR_M, LFR_N = 7, 6  # FunASR's low frame rate: 7 frames of 10 ms stacked every 6, so 60 ms a frame


def fbank_frames(samples, rate=16000):
    """Number of 25 ms frames every 10 ms, Kaldi's snip_edges=True."""
    window, shift = rate // 40, rate // 100
    return 1 + (samples - window) // shift if samples >= window else 0


def apply_lfr(feats):
    """Stack 7 frames every 6: (T, 80) -> (ceil(T/6), 560), oldest first, edges repeated."""
    steps = torch.arange(0, len(feats), LFR_N)[:, None]
    index = (steps + torch.arange(LFR_M) - (LFR_M - 1) // 2).clamp(0, len(feats) - 1)
    return feats[index].flatten(1)


def load_cmvn(path):
    """Read FunASR's `am.mvn`: (2, 560) float32; row 0 is added, row 1 multiplied."""
    text = Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""
    rows = re.findall(r"<LearnRateCoef>\s+\S+\s+\[([^\]]*)\]", text)
    if len(rows) < 2:
        raise UserError(f"{path}: expected a Kaldi nnet with <AddShift> and <Rescale>")
    return torch.tensor([[float(x) for x in row.split()] for row in rows[:2]])


def kaldi_fbank(wave, rate=16000, key="", dither=1.0):
    """Kaldi's log-mel of int16-scaled samples, 25 ms every 10 ms: (N,) -> (T, 80).

    FunASR dithers at inference too: without, digital silence lies 20 nats away from what the
    encoders were trained on. Here a clip's key seeds the noise: the same features in every run.
    """
    if len(wave) < rate // 40:
        raise AudioError(f"{len(wave) / rate:.3f} s is shorter than one 25 ms window")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(hash_text(key)[:15], 16))  # not the GPUs' too
        return torchaudio.compliance.kaldi.fbank(
            wave.float()[None] * 32768, num_mel_bins=80, dither=dither, energy_floor=0.0,
            window_type="hamming", sample_frequency=rate,
        )  # fmt: skip


def wav_frontend(wave, key="", dither=1.0, cmvn=None):
    """FunASR's `WavFrontend`: log-mel, LFR 7/6, CMVN. (N,) at 16 kHz -> (ceil(T/6), 560)."""
    feats = apply_lfr(kaldi_fbank(wave, 16000, key, dither))
    return feats if cmvn is None else (feats + cmvn[0]) * cmvn[1]


class SpecAugLFR(nn.Module):
    """SpecAugment (arXiv:1904.08779) on stacked features, with FunASR's arguments; in training.

    Input   feats (T, F), one clip (so its masks know its length).  Output  a masked copy.
    Units   freq_mask_width_range in mel bins, the same bins in all lfr_rate + 1 stacked frames;
            time_mask_width_range in feature frames (60 ms); upper bounds excluded, as in FunASR.
    Departures from FunASR: time_mask_max_ratio caps each time mask at a share of the clip; `fill`
    is the clip's mean, since FunASR's 0.0 (fill="zero") lies below any silence an encoder knows.
    """

    def __init__(
        self, apply_freq_mask=True, freq_mask_width_range=(0, 20), num_freq_mask=2, lfr_rate=6,
        apply_time_mask=True, time_mask_width_range=(0, 10), num_time_mask=2,
        time_mask_max_ratio=1.0, fill="mean",
    ):  # fmt: skip
        super().__init__()
        ranges = freq_mask_width_range, time_mask_width_range
        if any(len(pair) != 2 or pair[0] >= pair[1] for pair in ranges):
            raise UserError(f"specaug: widths {ranges}: expected [low, high] with high > low")
        if fill not in ("mean", "zero"):
            raise UserError(f"specaug: fill is mean or zero, got {fill!r}")
        self.freq_range, self.time_range = ranges
        self.num_freq_mask = num_freq_mask if apply_freq_mask else 0
        self.num_time_mask = num_time_mask if apply_time_mask else 0
        self.groups, self.max_ratio, self.fill = lfr_rate + 1, time_mask_max_ratio, fill

    def forward(self, feats, generator=None):
        if not self.training:
            return feats
        frames, bins = len(feats), feats.shape[1] // self.groups

        def draw(widths, size, most):
            width = min(int(torch.randint(*widths, (), generator=generator)), most)
            first = int(torch.randint(0, max(1, size - width), (), generator=generator))
            return slice(first, first + width)

        hidden = torch.zeros(frames, bins, dtype=torch.bool)
        for _ in range(self.num_freq_mask):
            hidden[:, draw(self.freq_range, bins, bins)] = True
        hidden = hidden.repeat(1, self.groups)
        for _ in range(self.num_time_mask):
            hidden[draw(self.time_range, frames, int(frames * self.max_ratio))] = True
        fill = feats.mean(0) if self.fill == "mean" else torch.zeros_like(feats[0])
        return torch.where(hidden, fill, feats)


# ---- SANM encoder -----------------------------------------------------------


def length_mask(lens, size, device=None):
    """Bool mask (B, size), True on real positions; lens (B,) on the CPU."""
    return (torch.arange(size) < lens[:, None]).to(device, non_blocking=True)


def attention_window(size, left=-1, right=-1, style="regular", device=None):
    """Bool mask (size, size): which frames j a frame i sees, left <= i - j and so on; -1: all.

    style   regular, a band, which adds up over layers; chunked_limited: chunks of right + 1 frames
            and as many before them as `left` holds, so that the look-ahead does not add up.
    """
    at = torch.arange(size, device=device)
    if style == "chunked_limited" and right >= 0:
        at, left, right = at // (right + 1), left if left < 0 else left // (right + 1), 0
    behind = at[:, None] - at  # frames, or chunks, that j lies before i
    seen = torch.ones_like(behind, dtype=torch.bool)
    seen = seen & (behind <= left) if left >= 0 else seen
    return seen & (behind >= -right) if right >= 0 else seen


class SANMAttention(nn.Module):
    """Multi-head attention plus a memory: a depthwise convolution (FSMN) over the values."""

    def __init__(self, input_size, size, heads, kernel_size, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.linear_q_k_v = nn.Linear(input_size, 3 * size)
        self.linear_out = nn.Linear(size, size)
        self.fsmn_block = nn.Conv1d(size, size, kernel_size, groups=size, bias=False)
        self.pads = (0, 0, (kernel_size - 1) // 2, kernel_size // 2)
        self.window = ()  # of attention_window

    def forward(self, x, mask):  # x (B, T, C), mask (B, T)
        query, key, value = self.linear_q_k_v(x).chunk(3, dim=-1)  # each (B, T, W)
        keep = mask[..., None].to(value.dtype)  # padding never leaks into the memory
        padded = F.pad(value * keep, self.pads).transpose(1, 2)[:, :, None]
        # (B, W, 1, T + kernel - 1), an image of height 1: conv1d would copy twice, 5 x slower
        weight = self.fsmn_block.weight[:, :, None]
        memory = F.conv2d(padded, weight, groups=padded.shape[1])[:, :, 0].transpose(1, 2)
        memory = F.dropout(memory + value * keep, self.dropout, self.training) * keep  # (B, T, W)
        split = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value)]
        dropout, seen = self.dropout if self.training else 0.0, mask[:, None, None]  # (B, 1, 1, T)
        if self.window:  # what lies past the end sees itself: a row without any would be NaN
            seen = seen & attention_window(x.shape[1], *self.window, device=x.device)
            seen = seen | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        attended = F.scaled_dot_product_attention(*split, seen, dropout)
        return self.linear_out(attended.transpose(1, 2).flatten(2)) + memory


class SANMFeedForward(nn.Module):
    def __init__(self, size, hidden, dropout):
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(size, hidden), nn.Linear(hidden, size)
        self.dropout = dropout

    def forward(self, x):
        return self.w_2(F.dropout(F.relu(self.w_1(x)), self.dropout, self.training))


class SANMLayer(nn.Module):
    """Pre-norm block. Where input and output sizes differ (block 0) attention has no residual."""

    def __init__(self, input_size, size, heads, hidden, kernel_size, dropout, attention_dropout):
        super().__init__()
        self.self_attn = SANMAttention(input_size, size, heads, kernel_size, attention_dropout)
        self.feed_forward = SANMFeedForward(size, hidden, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(input_size), nn.LayerNorm(size)
        self.residual, self.dropout = input_size == size, dropout

    def forward(self, x, mask):
        attended = F.dropout(self.self_attn(self.norm1(x), mask), self.dropout, self.training)
        x = x + attended if self.residual else attended
        return x + F.dropout(self.feed_forward(self.norm2(x)), self.dropout, self.training)


class SenseVoiceEncoder(nn.Module):
    """The encoder of SenseVoiceSmall and Fun-ASR-Nano: 50 SANM blocks, a norm, 20 more, a norm.

    Input   feats (B, T, 560) float, 60 ms a frame; lens (B,).
    Output  enc (B, T, 512), lens. Rows past lens mean nothing and influence no real row.
    Raises  ValueError if feats is not `input_size` wide.
    Source  funasr's `SenseVoiceEncoderSmall`, with its state-dict names; 221.1 M parameters.
    """

    def __init__(
        self, input_size=560, output_size=512, attention_heads=4, linear_units=2048, num_blocks=50,
        tp_blocks=20, kernel_size=11, dropout_rate=0.1, attention_dropout_rate=0.1, **_,
    ):  # fmt: skip
        super().__init__()  # FunASR's encoder_conf has more keys, of one value each
        self.input_size, self.output_size = input_size, output_size
        sizes = (output_size, attention_heads, linear_units, kernel_size)
        inputs = [input_size] + [output_size] * (num_blocks + tp_blocks - 1)
        rates = dropout_rate, attention_dropout_rate
        layers = nn.ModuleList([SANMLayer(size, *sizes, *rates) for size in inputs])
        self.encoders0, self.encoders = layers[:1], layers[1:num_blocks]
        self.tp_encoders = layers[num_blocks:]
        self.after_norm, self.tp_norm = nn.LayerNorm(output_size), nn.LayerNorm(output_size)

    def forward(self, feats, lens):
        if feats.shape[-1] != self.input_size:
            raise ValueError(f"features {self.input_size} wide expected, got {tuple(feats.shape)}")
        length, half, device = feats.shape[1], self.input_size // 2, feats.device
        rates = torch.exp(torch.arange(half, device=device) * (-math.log(10000) / (half - 1)))
        angles = torch.arange(1, length + 1, device=device)[:, None] * rates  # counted from 1
        positions = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (T, F)
        x = feats * self.output_size**0.5 + positions.to(feats.dtype)
        mask = length_mask(lens, length, device)  # (B, T)
        x = x.masked_fill(~mask[..., None], 0.0)  # NaN in the padding would survive a product by 0
        for layer in [*self.encoders0, *self.encoders]:
            x = layer(x, mask)
        x = self.after_norm(x)
        for layer in self.tp_encoders:
            x = layer(x, mask)
        return self.tp_norm(x), lens


# ---- encoders ---------------------------------------------------------------


def freeze(module):
    """Freeze for good: no gradients, and eval mode whatever `train()` its parents call.

    Without it `model.train()` silently switches dropout back on inside "frozen" modules.
    """
    module.requires_grad_(False).eval()
    module.train = functools.partial(stay_in_eval, module)  # a partial, as it can be pickled
    return module


def stay_in_eval(module, mode=True):
    """The `train()` of a frozen module: only LoRA's own dropout inside it follows the mode."""
    for name, part in module.named_modules():
        if name.endswith("lora_dropout"):
            nn.Module.train(part, mode)
    return module


def freeze_by_name(module, patterns, keep=()):
    """Freeze the parameters whose names a regular expression matches from their start, unless one
    of `keep` does; parts that are frozen as a whole stay in eval for good. All else trains.

    Names are those without PEFT's `base_layer`; NeMo's `llm.layers` and `embed_tokens` are known.
    Raises  UserError for a pattern that matches nothing, with the nearest names.
    """
    for part in module.modules():
        part.__dict__.pop("train", None)  # of an earlier `freeze`
    named = {"perception.preprocessor.featurizer.fb": None}  # NeMo's, which has no weights here
    named |= {n.replace(".base_layer.", "."): p for n, p in module.named_parameters()}
    module.requires_grad_(True)

    def matches(name, expressions):
        names = name, re.sub(r"^llm\.model\.(?=layers|embed)", "llm.", name)
        return any(re.match(e, n.removeprefix("llm.") if e.startswith("^embed") else n)
                   for e in expressions for n in names)  # fmt: skip

    for pattern in (*patterns, *keep):
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"freeze_params: {pattern}: no regular expression, {error}") from error
        if not any(matches(name, [pattern]) for name in named):
            nearest = difflib.get_close_matches(re.sub(r"[\\^$+*]", "", pattern), named, 3, 0.0)
            raise UserError(f"freeze_params: {pattern} matches nothing; nearest: {nearest}")
    for name, parameter in named.items():
        if parameter is not None and matches(name, patterns) and not matches(name, keep):
            parameter.requires_grad_(False)

    def settle(part):
        own = [p for name, p in part.named_parameters() if "lora_" not in name]
        if own and not any(p.requires_grad for p in own):
            lora = [p for name, p in part.named_parameters() if p.requires_grad]
            freeze(part)
            for p in lora:
                p.requires_grad_(True)
        else:
            for child in part.children():
                settle(child)

    settle(module.train())


def find_model(name):
    """Folder of a model: `name` itself, else a download by hub name (only then is the net used)."""
    if Path(name).is_dir():
        return Path(name)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(name)):
        raise UserError(f"{name}: no such folder; give one, or a hub name like openai/whisper-tiny")
    try:
        ours = name.startswith(("iic/", "FunAudioLLM/")) and not name.endswith("-hf")
        if ours:  # only ModelScope's Fun-ASR-Nano has CTC; transformers' lies on Hugging Face
            from modelscope import snapshot_download

            return Path(snapshot_download(name))
        from huggingface_hub import snapshot_download

        wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # both hubs raise many types; the user needs the same advice
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise UserError(f"{name}: no folder, and its hub is not reached ({reason})") from error


@contextlib.contextmanager
def loading(folder):
    """Around what loads a folder's models: what is not whole in it becomes one line."""
    for path in filter(Path.is_file, sorted(Path(folder).glob("*.*"))):
        refuse_pointer(path)
        if path.suffix == ".safetensors":
            open_shard(path, "download it again")
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers and others raise many types
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        advice = "not whole, download it again, or of another kind"
        raise UserError(f"{folder}: {advice} ({reason})") from error


def load_tokenizer(folder):
    """The tokenizer of an LLM's folder."""
    from transformers import AutoTokenizer

    with loading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise UserError(f"{folder}: has no tokenizer; download its tokenizer files too")
    return tokenizer


class SpeechEncoder(nn.Module):
    """A speech encoder behind one face.

    Attributes  width W, frame_ms (ms between frames), sample_rate (Hz), layers (its blocks, in
                order), identity (what names the weights and all that changes the output); causal:
                an output hears nothing behind its frame, but `lookahead` samples; it has `stream`.
    features    wave (N,), key -> feats (T, F): in data workers, on the CPU.
    forward     feats (B, T, F), lens (B,) -> enc (B, T', W), lens (B,). Padding never matters.
    num_frames  samples -> T', the length formula that batching uses; out_lens: T -> T'.
    stream      samples (n,), state (None at first; then each call has whole frames) -> enc
                (1, k, W), state: the same outputs, as the audio comes in.
    """

    causal, lookahead = False, 0
    keep_features = False  # they are worth it: frozen layers make them

    def __init__(self, net, layers, width, frame_ms, identity, stride=1):
        super().__init__()
        self.net, self.width, self.frame_ms, self.sample_rate = net, width, frame_ms, 16000
        self.layers, self.stride = tuple(layers), stride  # a tuple: net has registered them
        weights = hash_tensors(net.state_dict())
        self.identity = {"weights": weights, "width": width, "frame_ms": frame_ms} | identity

    def out_lens(self, lens):
        return -(-lens // self.stride)


def read_funasr(folder):
    """config.yaml and the tensors of model.pt, memory-mapped, of a FunASR folder."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: has no config.yaml")
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return config, read_weights(folder / "model.pt", mmap=True)


class KaldiEncoder(SpeechEncoder):
    """SenseVoiceSmall, or the encoder of Fun-ASR-Nano, from a folder in the release's layout.

    SenseVoiceSmall puts four query frames [language, event, emotion, text norm] before the speech
    and applies `am.mvn`; Fun-ASR-Nano does neither, so their caches are not interchangeable.
    """

    LANGUAGES = {"auto": 0, "zh": 3, "en": 4, "yue": 7, "ja": 11, "ko": 12, "nospeech": 13}
    TEXT_NORMS = {"withitn": 14, "woitn": 15}  # rows of `embed`, as the languages

    def __init__(self, folder, language="auto", text_norm="woitn", keep_query_frames=False):
        config, weights = read_funasr(folder)
        nano = "FunASRNano" in str(config.get("model", ""))
        part = "audio_encoder" if nano else "encoder"
        net, prefix = SenseVoiceEncoder(**config[f"{part}_conf"]), f"{part}."
        own = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        load_weights(net, own, folder / "model.pt")
        with_queries = keep_query_frames and not nano
        identity = {"front_end": "kaldi80-lfr7/6-dither1", "query_frames": with_queries}
        cmvn, queries = None, None
        if not nano:
            for value, table in ((language, self.LANGUAGES), (text_norm, self.TEXT_NORMS)):
                if value not in table:
                    raise UserError(f"SenseVoiceSmall: {value!r} is none of {', '.join(table)}")
            rows = torch.tensor([self.LANGUAGES[language], 1, 2, self.TEXT_NORMS[text_norm]])
            cmvn, queries = load_cmvn(folder / "am.mvn"), weights["embed.weight"][rows].float()
            around = hash_tensors({"cmvn": cmvn, "queries": queries})
            identity |= {"language": language, "text_norm": text_norm, "around": around}
        layers = [*net.encoders0, *net.encoders, *net.tp_encoders]
        super().__init__(net, layers, net.output_size, 60.0, identity)
        self.cmvn, self.keep_query_frames = cmvn, with_queries
        self.register_buffer("queries", queries)  # (4, 560) or None

    def num_frames(self, samples):
        return -(-fbank_frames(samples) // LFR_N) + 4 * self.keep_query_frames

    def features(self, wave, key=""):
        return wav_frontend(wave, key, cmvn=self.cmvn)

    def forward(self, feats, lens):
        if self.queries is None:
            return self.net(feats, lens)
        queries = self.queries.to(feats.dtype).expand(len(feats), -1, -1)
        enc, lens = self.net(torch.cat([queries, feats], dim=1), lens + 4)  # (B, 4 + T, W)
        return (enc, lens) if self.keep_query_frames else (enc[:, 4:], lens - 4)


class WhisperEncoder(SpeechEncoder):
    """Any transformers Whisper encoder, at clip length (default) or padded to 30 s as in training.

    A 3 s clip then costs 3.2 s of frames instead of 30. The features differ a little (cosine 0.90
    to 0.96): an adaptor must be used with the setting it was trained with.
    """

    TAIL_S = 0.2  # silence behind a clip: without it the last word is cut, since Whisper expects it

    def __init__(self, folder, pad_to_30s=False):
        from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

        whisper = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        net, extractor = whisper.model.encoder, WhisperFeatureExtractor.from_pretrained(folder)
        front_end = f"whisper-mel{extractor.feature_size}-tail{self.TAIL_S}"
        identity = {"front_end": front_end, "pad_to_30s": pad_to_30s}
        super().__init__(net, net.layers, net.config.d_model, 20.0, identity, stride=2)
        self.extractor, self.pad_to_30s = extractor, pad_to_30s
        self.max_samples = 2 * net.config.max_source_positions * extractor.hop_length

    def padded(self, samples):
        tail = round(self.TAIL_S * self.sample_rate)
        return self.max_samples if self.pad_to_30s else min(self.max_samples, samples + tail)

    def num_frames(self, samples):
        return self.out_lens(self.padded(samples) // self.extractor.hop_length)

    def features(self, wave, key=""):
        """Whisper's log-mel: (mel frames, M)."""
        if len(wave) > self.max_samples:
            seconds = len(wave) / self.sample_rate
            raise AudioError(f"{seconds:.1f} s is longer than Whisper's 30 s; split it")
        wave = F.pad(wave, (0, self.padded(len(wave)) - len(wave))).numpy()
        found = self.extractor(wave, sampling_rate=self.sample_rate, padding="longest")
        return torch.as_tensor(found["input_features"][0]).T

    def forward(self, feats, lens):
        net = self.net
        keep = length_mask(lens, feats.shape[1], feats.device)[:, None]  # (B, 1, mel frames)
        x = feats.transpose(1, 2).masked_fill(~keep, 0.0)  # (B, M, mel frames)
        x = F.gelu(net.conv1(x)) * keep  # conv2 must see zeros past the end, as for a single clip
        x = F.gelu(net.conv2(x)).transpose(1, 2)  # (B, T, W)
        lens, frames = self.out_lens(lens), x.shape[1]
        x = x + net.embed_positions.weight[:frames]
        mask = length_mask(lens, frames, x.device)[:, None, None].expand(-1, 1, frames, -1)
        mask = mask if int(lens.min()) < frames else None
        for layer in net.layers:
            x = layer(x, mask)
        return net.layer_norm(x), lens


class ParakeetEncoder(SpeechEncoder):
    """The FastConformer encoder of transformers' Parakeet models: 80 ms frames, no final norm."""

    def __init__(self, folder):
        from transformers import ParakeetEncoder as Net
        from transformers import ParakeetFeatureExtractor

        net = Net.from_pretrained(folder, dtype=torch.float32)
        net.layerdrop = 0.0  # where it trains, DDP waits for every layer
        width, stride = net.config.hidden_size, net.config.subsampling_factor
        identity = {"front_end": f"parakeet-mel{net.config.num_mel_bins}"}
        super().__init__(net, net.layers, width, 10.0 * stride, identity, stride)
        self.extractor = ParakeetFeatureExtractor.from_pretrained(folder)

    def num_frames(self, samples):
        return self.out_lens(samples // self.extractor.hop_length)

    def features(self, wave, key=""):
        frames = len(wave) // self.extractor.hop_length
        if frames < 2:  # a clip is normalised by its own deviation, which one frame has not
            raise AudioError(f"{len(wave) / 16000:.3f} s is shorter than two frames of 10 ms")
        found = self.extractor(wave.numpy(), sampling_rate=self.sample_rate)
        return torch.as_tensor(found["input_features"][0])[:frames]  # (mel frames, M)

    def forward(self, feats, lens):
        mask = length_mask(lens, feats.shape[1], feats.device)
        feats = feats.masked_fill(~mask[..., None], 0.0)  # its first convolution looks past the end
        return self.net(feats, attention_mask=mask).last_hidden_state, self.out_lens(lens)


class NemotronEncoder(SpeechEncoder):
    """The causal FastConformer of transformers' nemotron_asr_streaming, without look-ahead (its
    default are 13 frames): output t hears 80 (t + 1) ms, and the 12.5 ms of half a window."""

    causal, lookahead = True, 200

    def __init__(self, folder):
        from transformers import NemotronAsrStreamingEncoder as Net
        from transformers import NemotronAsrStreamingFeatureExtractor

        net = Net.from_pretrained(folder, dtype=torch.float32)
        net.layerdrop = 0.0  # where it trains, DDP waits for every layer
        width, stride = net.config.hidden_size, net.config.subsampling_factor
        identity = {"front_end": f"nemotron-mel{net.config.num_mel_bins}"}
        super().__init__(net, net.layers, width, 10.0 * stride, identity, stride)
        self.extractor = NemotronAsrStreamingFeatureExtractor.from_pretrained(folder)

    def num_frames(self, samples):
        return samples // (160 * self.stride)

    def out_lens(self, lens):
        return lens // self.stride

    def features(self, wave, key=""):
        frames = self.num_frames(len(wave))  # whole ones
        wave = F.pad(wave[: frames * 160 * self.stride], (0, 400))  # windows are half as long
        mels = self.extractor(wave.numpy(), sampling_rate=16000)["input_features"]
        return torch.as_tensor(mels[0])[: frames * self.stride + 1]

    def forward(self, feats, lens):
        found = self.net(
            feats, num_lookahead_tokens=0
        )  # the future never matters, nor does padding
        return found.last_hidden_state[:, 1:], self.out_lens(lens)  # the first hears 12.5 ms alone

    def stream(self, samples, state=None):
        # a window has 256 samples on either side of its centre, of which 200 count
        first, (tail, caches) = state is None, state or (samples[:0], {})
        wave = torch.cat([tail, samples])
        padded = F.pad(wave, (0, 400 if first else 56)).numpy()
        found = self.extractor(padded, sampling_rate=16000, center=first)["input_features"]
        count = (len(samples) - self.lookahead * first) // 160
        mels = torch.as_tensor(found)[:, : count + 1] if first else torch.as_tensor(found)
        found = self.net(mels.to(self.net.device), use_cache=True, num_lookahead_tokens=0, **caches)
        caches = {"cache": found.cache, "padding_cache": found.padding_cache}
        return found.last_hidden_state[:, int(first) :], (wave[-296:], caches)


class ScratchEncoder(SpeechEncoder):
    """Log-mels, three convolutions of stride 2 and a GRU: 80 ms frames that hear no future.

    Nothing is padded but the beginning of the wave, so that a stream has the same outputs.
    """

    causal = True
    context = 21  # mel frames that the convolutions see in front of a frame of 80 ms

    def __init__(self, rate, n_mels, channels, hidden, layers, dropout):
        if rate % 1000:
            raise UserError(f"data.source_sample_rate={rate}: whole kHz, for frames of 80 ms")
        if len(channels) != 3:
            raise UserError("perception.encoder.channels: three, for 80 ms a frame")
        sizes = [n_mels, *map(int, channels)]
        convs = nn.ModuleList(nn.Conv1d(a, b, 5, stride=2) for a, b in itertools.pairwise(sizes))
        norms = nn.ModuleList(nn.LayerNorm(size) for size in sizes[1:])
        gru = nn.GRU(sizes[-1], hidden, layers, batch_first=True, dropout=dropout)
        about = {"front_end": f"causal-mel{n_mels}-{rate}", "channels": sizes[1:], "layers": layers}
        net = nn.ModuleDict({"convs": convs, "norms": norms, "gru": gru})
        super().__init__(net, [], hidden, 80.0, about)
        del self.identity["weights"]  # random ones: those that count are saved
        self.sample_rate, self.dropout = rate, dropout
        self.hop, self.window = rate // 100, rate // 40
        # no buffer: features are made on the CPU, also in the workers of a process with a GPU
        self.bank = torchaudio.functional.melscale_fbanks(257, 60.0, rate / 2, n_mels, rate)

    @property
    def before(self):
        """Samples that are heard in front of a frame."""
        return self.context * self.hop + self.window - self.hop

    def num_frames(self, samples):
        return samples // (8 * self.hop)

    def out_lens(self, lens):
        return (lens - self.context) // 8

    def mels(self, wave):
        frames = wave.unfold(0, self.window, self.hop) * torch.hann_window(self.window)
        power = torch.fft.rfft(frames, 512).abs().pow(2) @ self.bank
        return (power + 1e-6).log() / 4 + 1

    read = mels  # what `features` gives, of a wave with the samples before it

    def features(self, wave, key=""):
        return self.read(F.pad(wave, (self.before, 0)))

    def convolve(self, x):
        for conv, norm in zip(self.net["convs"], self.net["norms"], strict=True):
            x = F.gelu(norm(conv(x.transpose(1, 2)).transpose(1, 2)))
        return x

    def forward(self, feats, lens):
        x = F.dropout(self.convolve(feats), self.dropout, self.training)
        return self.net["gru"](x)[0], self.out_lens(lens)

    def stream(self, samples, state=None):
        tail, hidden = state or (torch.zeros(self.before), None)
        wave = torch.cat([tail, samples])
        x = self.read(wave)[None].to(self.net["gru"].weight_hh_l0.device)
        x, hidden = self.net["gru"](self.convolve(x), hidden)
        return x, (wave[-self.before :], hidden)


class SpeechEmbedding(ScratchEncoder):
    """Google's frozen speech_embedding (arXiv:2002.01322), 96 numbers of the last 775 ms at 16 kHz,
    and a GRU of our own. The weights are openWakeWord's; see demo/dialogues.py."""

    keep_features, context = True, 68
    widths = (1, *[24] * 3, *[48] * 4, *[72] * 4, *[96] * 9)
    pools = {2: (2, 2), 6: (1, 2), 10: (2, 2), 14: (1, 2), 18: (2, 2)}

    def __init__(self, folder, hidden, layers, dropout):
        from safetensors.torch import load_file

        super().__init__(16000, 32, [1, 1, 96], hidden, layers, dropout)
        self.net["convs"] = self.net["norms"] = nn.ModuleList()
        self.window, front = 512, nn.ModuleDict({"norm": nn.BatchNorm2d(24, eps=1e-3)})
        for n, (one, other) in enumerate(itertools.pairwise(self.widths)):
            kernel = (3, 3) if n == 0 else (1, 3) if n % 2 and n < 19 else (3, 1)
            padding = (0, 1) if kernel[1] == 3 else 0
            front[str(n)] = nn.Conv2d(one, other, kernel, padding=padding)
        weights = load_file(Path(folder) / "model.safetensors")
        self.hann, self.bank = weights.pop("window"), weights.pop("bank")
        load_weights(front, weights, folder)
        self.__dict__["front"] = freeze(front)  # past nn.Module: it stays on the CPU
        self.identity |= {"front_end": f"speech_embedding-{hash_tensors(weights)}"}

    def mels(self, wave):
        """In dB above a fixed floor: the original's, 80 dB below the loudest, knows the future."""
        frames = 32768 * wave.unfold(0, self.window, self.hop) * self.hann
        power = torch.fft.rfft(frames).abs().pow(2) @ self.bank
        return power.clamp(min=100.0).log10() + 2

    def read(self, wave):
        return self.embed(self.mels(wave))

    @torch.no_grad()
    def embed(self, mels):  # (F, 32) -> (T, 96)
        x = self.front["0"](mels[None, None])
        x = self.front["norm"](F.relu(x))
        for n in range(1, 20):
            x = self.front[str(n)](F.leaky_relu(x, 0.2).clamp(min=-0.4))
            if n in self.pools:  # of what is activated, which is monotonous
                x = F.max_pool2d(x, self.pools[n])
        return x[0, :, :, 0].T

    def convolve(self, x):
        return x

    def out_lens(self, lens):
        return lens


def set_attention_window(encoder, left, right):
    """Let every layer of an encoder attend to so many frames only; -1: all. Convolutions (SANM's
    memory, Parakeet's) still see their neighbours."""

    def narrow(layer, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        own = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        seen = attention_window(x.shape[1], left, right, device=x.device)[None, None]
        if own is not None:  # a row of padding that sees nothing would be NaN, but for Parakeet's
            alone = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            seen = seen & own | alone & own.any(-1, keepdim=True)
        if len(args) > 1:
            return (args[0], seen, *args[2:]), kwargs
        return args, kwargs | {"attention_mask": seen}

    encoder.identity |= {"att_context_size": [left, right]}
    for layer in encoder.layers:
        if isinstance(layer, SANMLayer):
            layer.self_attn.window = left, right
        else:
            layer.register_forward_pre_hook(narrow, with_kwargs=True)


def load_encoder(
    name, language="auto", text_norm="woitn", keep_query_frames=False, pad_to_30s=False
):
    """Load SenseVoiceSmall, Fun-ASR-Nano's encoder, or any Whisper, Parakeet or streaming Nemotron
    of transformers.

    Input   name: on its hub, or a folder in the hub's layout; the rest is SenseVoiceSmall's, and
            pad_to_30s Whisper's.
    Output  SpeechEncoder, fp32, on the CPU, in eval mode; `freeze` it unless it is to be trained.
    """
    folder, kind = find_model(name), ""
    with loading(folder):
        if (folder / "config.json").is_file():
            kind = str(json.loads((folder / "config.json").read_text()).get("model_type"))
        if (folder / "config.yaml").is_file():
            encoder = KaldiEncoder(folder, language, text_norm, keep_query_frames)
        elif kind == "whisper":
            encoder = WhisperEncoder(folder, pad_to_30s)
        elif kind.startswith("parakeet"):
            encoder = ParakeetEncoder(folder)
        elif kind.startswith("nemotron_asr_streaming"):
            encoder = NemotronEncoder(folder)
        else:
            known = "config.yaml of FunASR nor config.json of Whisper, Parakeet or Nemotron"
            raise UserError(f"{name}: has neither {known} (model_type: {kind or 'none'})")
    encoder.identity["name"] = str(name)
    return encoder.eval()


# ---- adaptor and CTC --------------------------------------------------------


class AudioAdaptor(nn.Module):
    """Map encoder frames to LLM embeddings: stack, Linear, transformer, Linear, LayerNorm.

    Input   enc (B, T, input_dim), enc_lens (B,) on the CPU, real frames in each row.
    Output  emb (B, S, output_dim), S = ceil(T / stack); emb_lens (B,). Rows past emb_lens are zero.
            Padding, even NaN, never reaches a real position.
    Raises  ValueError if enc has another width or a length lies outside 1..T.
    Source  the published adaptor's names and order, 207.7 M by default. Departures: padding is
            masked; `norm.weight` can start at the RMS of the LLM's embeddings, of which a LayerNorm
            at 1.0 is some 40 times as loud for Qwen3. Stacking as in SLAM-ASR (arXiv:2402.08846),
            a ragged tail padded, not dropped; num_layers=0 is its Linear-GELU-Linear.
    """

    def __init__(
        self, input_dim=512, output_dim=2560, hidden_dim=2048, num_layers=4, num_heads=8,
        dropout=0.1, stack=1, pre_norm=False, embedding_rms=1.0,
    ):  # fmt: skip
        super().__init__()
        if stack < 1 or num_heads < 1 or num_layers and hidden_dim % num_heads:
            heads = f"num_heads={num_heads} has to divide hidden_dim={hidden_dim}"
            raise UserError(f"adaptor: {heads}, stack={stack} to be at least 1")
        self.input_dim, self.stack = input_dim, stack
        self.input_proj = nn.Linear(input_dim * stack, hidden_dim)
        sizes = (hidden_dim, num_heads, 4 * hidden_dim, dropout, "gelu")
        if num_layers:
            layer = functools.partial(nn.TransformerEncoderLayer, *sizes, batch_first=True)
            layers = nn.ModuleList([layer(norm_first=pre_norm) for _ in range(num_layers)])
            self.transformer = nn.TransformerEncoder(layers[0], 1, enable_nested_tensor=False)
            self.transformer.layers = layers  # its own would be copies of the first
        else:
            self.transformer, self.activation = None, nn.Sequential(nn.GELU(), nn.Dropout(dropout))
        self.output_proj, self.norm = nn.Linear(hidden_dim, output_dim), nn.LayerNorm(output_dim)
        nn.init.constant_(self.norm.weight, embedding_rms)

    def out_lens(self, enc_lens):
        return -(-enc_lens // self.stack)

    def forward(self, enc, enc_lens):
        batch, frames, width = enc.shape
        if width != self.input_dim or not 1 <= int(enc_lens.min()) <= int(enc_lens.max()) <= frames:
            got = f"{tuple(enc.shape)} and {enc_lens.tolist()}"
            raise ValueError(f"(B, T, {self.input_dim}) and lengths in 1..T expected, got {got}")
        enc = enc.masked_fill(~length_mask(enc_lens, frames, enc.device)[..., None], 0.0)
        enc = F.pad(enc, (0, 0, 0, -frames % self.stack))  # (B, S * stack, W)
        x = self.input_proj(enc.reshape(batch, -1, width * self.stack))  # (B, S, hidden)
        emb_lens = self.out_lens(enc_lens)
        mask = length_mask(emb_lens, x.shape[1], x.device)
        if self.transformer is None:
            x = self.activation(x)
        else:
            x = self.transformer(x, src_key_padding_mask=~mask)
        return self.norm(self.output_proj(x)).masked_fill(~mask[..., None], 0.0), emb_lens


class ConformerAttention(nn.Module):
    """Attention by content and by distance (arXiv:1901.02860); by content alone without `distance`
    (of abs_pos)."""

    def __init__(self, size, heads, dropout, relative):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        for name in ("linear_q", "linear_k", "linear_v", "linear_out"):
            setattr(self, name, nn.Linear(size, size))
        if relative:
            self.linear_pos = nn.Linear(size, size, bias=False)
            self.pos_bias_u = nn.Parameter(torch.zeros(heads, size // heads))
            self.pos_bias_v = nn.Parameter(torch.zeros(heads, size // heads))

    def forward(self, x, seen, distance):  # (B, T, D), (B, 1, T, T), (2 T - 1, D) or None
        projected = self.linear_q(x), self.linear_k(x), self.linear_v(x)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in projected)
        bias = seen
        if distance is not None:
            far = self.linear_pos(distance).unflatten(-1, (self.heads, -1)).permute(1, 2, 0)
            by_distance = (query + self.pos_bias_v[:, None]) @ far  # (B, H, T, 2 T - 1)
            at = torch.arange(x.shape[1], device=x.device)
            places = (x.shape[1] - 1 - at[:, None] + at).expand(*query.shape[:2], -1, -1)
            bias = by_distance.gather(-1, places) / query.shape[-1] ** 0.5  # (B, H, T, T)
            bias = bias.masked_fill(~seen, -math.inf)
            query = query + self.pos_bias_u[:, None]
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(query, key, value, bias, dropout)
        return self.linear_out(attended.transpose(1, 2).flatten(2))


class ConformerConvolution(nn.Module):
    """Gated depthwise convolution; its norm sees real frames only."""

    def __init__(self, size, kernel, context, norm):
        super().__init__()
        left, right = [kernel // 2, (kernel - 1) // 2] if context is None else context
        self.pads = left, right
        self.pointwise_conv1 = nn.Conv1d(size, 2 * size, 1)
        self.depthwise_conv = nn.Conv1d(size, size, kernel, groups=size)
        self.batch_norm = nn.BatchNorm1d(size) if norm == "batch_norm" else nn.LayerNorm(size)
        self.pointwise_conv2 = nn.Conv1d(size, size, 1)

    def forward(self, x, mask, real):  # (B, T, D), (B, T), places of real frames in B * T
        x = F.glu(self.pointwise_conv1(x.transpose(1, 2)), dim=1) * mask[:, None]
        x = self.depthwise_conv(F.pad(x, self.pads)).transpose(1, 2)  # (B, T, D)
        flat = self.batch_norm(x.flatten(0, 1)[real])
        x = flat.new_zeros(len(x) * x.shape[1], x.shape[2]).index_copy(0, real, flat).view(x.shape)
        return self.pointwise_conv2(F.silu(x).transpose(1, 2)).transpose(1, 2)


class ConformerLayer(nn.Module):
    def __init__(self, size, heads, hidden, relative, kernel, context, norm, dropout, dropout_att):
        super().__init__()
        for name in ("feed_forward1", "feed_forward2"):
            linears = {"linear1": nn.Linear(size, hidden), "linear2": nn.Linear(hidden, size)}
            setattr(self, name, nn.ModuleDict(linears))
        for name in ("feed_forward1", "self_att", "conv", "feed_forward2", "out"):
            setattr(self, f"norm_{name}", nn.LayerNorm(size))
        self.self_attn = ConformerAttention(size, heads, dropout_att, relative)
        self.conv, self.dropout = ConformerConvolution(size, kernel, context, norm), dropout

    def forward(self, x, seen, distance, mask, real):
        def drop(x):
            return F.dropout(x, self.dropout, self.training)

        def feed(part, x):
            return drop(part["linear2"](drop(F.silu(part["linear1"](x)))))

        x = x + 0.5 * feed(self.feed_forward1, self.norm_feed_forward1(x))
        x = x + drop(self.self_attn(self.norm_self_att(x), seen, distance))
        x = x + drop(self.conv(self.norm_conv(x), mask, real))
        x = x + 0.5 * feed(self.feed_forward2, self.norm_feed_forward2(x))
        return self.norm_out(x)


class Conformer(nn.Module):
    """NeMo's `ConformerEncoder` as an adapter of encoder frames, with its keys and its names.

    Input   x (B, T, feat_in), lens (B,) on the CPU.
    Output  (B, S, width), S = ceil(T / subsampling_factor), lens (B,). Rows past lens mean nothing;
            padding never reaches a real one, batch_norm's statistics included.
    Source  arXiv:2005.08100; layers equal to transformers' Parakeet's. Departs from NeMo where
            subsampling_factor is over 1: neighbouring frames are stacked, a ragged tail padded.
    """

    def __init__(
        self, feat_in, feat_out=-1, n_layers=2, d_model=512, subsampling_factor=1,
        ff_expansion_factor=4, self_attention_model="rel_pos", n_heads=8, att_context_size=(-1, -1),
        att_context_style="regular", xscaling=True, untie_biases=True, conv_kernel_size=9,
        conv_norm_type="batch_norm", conv_context_size=None, dropout=0.0, dropout_pre_encoder=0.0,
        dropout_emb=0.0, dropout_att=0.0,
    ):  # fmt: skip
        super().__init__()
        relative, context = self_attention_model == "rel_pos", conv_context_size
        context = [conv_kernel_size - 1, 0] if context == "causal" else context
        if d_model % (2 * n_heads) or context and sum(context) + 1 != conv_kernel_size:
            heads = f"d_model={d_model} over n_heads={n_heads} has to be even"
            raise UserError(f"{heads}, conv_context_size={context} one less than conv_kernel_size")
        self.stack, self.scale = subsampling_factor, d_model**0.5 if xscaling else 1.0
        self.window = *att_context_size, att_context_style
        self.drops = dropout_pre_encoder, dropout_emb
        self.pre_encode = nn.ModuleDict({"out": nn.Linear(feat_in * self.stack, d_model)})
        sizes = d_model, n_heads, ff_expansion_factor * d_model, relative, conv_kernel_size, context
        rest = conv_norm_type, dropout, dropout_att
        self.layers = nn.ModuleList([ConformerLayer(*sizes, *rest) for _ in range(n_layers)])
        for layer in self.layers[1:] if relative and not untie_biases else ():
            layer.self_attn.pos_bias_u = self.layers[0].self_attn.pos_bias_u
            layer.self_attn.pos_bias_v = self.layers[0].self_attn.pos_bias_v
        self.relative, self.width = relative, d_model if feat_out < 1 else feat_out
        self.out_proj = nn.Linear(d_model, feat_out) if feat_out > 0 else nn.Identity()

    def out_lens(self, lens):
        return -(-lens // self.stack)

    def forward(self, x, lens):
        x = x.masked_fill(~length_mask(lens, x.shape[1], x.device)[..., None], 0.0)
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.stack))
        x = self.pre_encode["out"](x.reshape(len(x), -1, x.shape[2] * self.stack)) * self.scale
        lens, size = self.out_lens(lens), x.shape[1]  # x (B, S, d_model)
        at = torch.arange(size - 1, -size if self.relative else -1, -1, device=x.device)
        at = at if self.relative else at.flip(0)
        rates = torch.arange(0, x.shape[2], 2, device=x.device) / x.shape[2]
        angles = at[:, None] * 10000.0**-rates
        positions = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
        positions = F.dropout(positions.to(x.dtype), self.drops[1], self.training)
        x = F.dropout(x if self.relative else x + positions, self.drops[0], self.training)
        mask = length_mask(lens, size)
        real = mask.flatten().nonzero()[:, 0].to(x.device, non_blocking=True)
        mask = mask.to(x.device, non_blocking=True)
        seen = attention_window(size, *self.window, device=x.device) & mask[:, None, None]
        seen = seen | torch.eye(size, dtype=torch.bool, device=x.device)  # (B, 1, S, S)
        for layer in self.layers:
            x = layer(x, seen, positions if self.relative else None, mask, real)
        return self.out_proj(x), lens


def embedding_rms(table):
    """Root mean square of an embedding table (V, D): how loud the LLM expects its input."""
    return float(table.detach().float().pow(2).mean().sqrt())


class CTCHead(nn.Module):
    """CTC of positions x (B, S, D) over the LLM's embeddings of token_ids and a learned blank.

    It makes minutes of speech count: each position is pulled towards the embedding of the token
    that is spoken there, which is just what the LLM reads.
    Output  log-probabilities (B, S, C + 1) fp32, the blank last.
    """

    def __init__(self, embedding, token_ids):
        super().__init__()
        device, width = embedding.device, embedding.shape[1]
        token_ids = torch.as_tensor(token_ids, device=device)
        self.register_buffer("token_ids", token_ids)  # class -> token of the LLM
        self.token_of, self.blank = token_ids.tolist(), len(token_ids)
        self.class_of = {token: number for number, token in enumerate(self.token_of)}
        table = embedding.detach()[token_ids].float()
        # frozen; zero rows up to a multiple of 8, since a GPU has slow kernels for odd numbers
        self.register_buffer("rows", F.pad(table, (0, 0, 0, -len(table) % 8)), persistent=False)
        rms = embedding_rms(table)
        self.blank_row = nn.Parameter(torch.randn(width, device=device) * rms)
        self.blank_bias = nn.Parameter(torch.zeros(1, device=device))
        # unrelated vectors then score with standard deviation 1, a perfect match sqrt(D)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(rms**2 * width**0.5), device=device))

    @classmethod
    def load(cls, path, embedding):
        weights = read_weights(path)
        head = cls(embedding, weights.get("token_ids", torch.zeros(0, dtype=torch.long)))
        load_weights(head, weights, path)
        return head

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):  # in bf16 they would be off by 1 %
            x = x.float() * self.log_scale.exp()
            blank = x @ self.blank_row[:, None] + self.blank_bias
            return torch.cat([(x @ self.rows.T)[..., : self.blank], blank], -1).log_softmax(-1)

    def classes(self, ids):
        """Token ids -> classes; tokens that the head lacks are left out (training counts them)."""
        return [self.class_of[token] for token in ids if token in self.class_of]

    def tokens(self, classes):
        return [self.token_of[c] for c in classes]


def ctc_loss(log_probs, lens, targets, blank):
    """Sum over the batch of -log p(target), and how many rows were left out.

    A row with more labels than frames allow, for which `zero_infinity` would hide an infinite loss,
    or without any is left out.
    Input   log_probs (B, S, C + 1), lens (B,), targets: list of class lists.
    """
    fits = [n for n, row in enumerate(targets) if row and ctc_min_frames(row) <= lens[n]]
    if not fits:
        return log_probs.sum() * 0.0, len(targets)
    if len(fits) < len(targets):  # else no copy of the scores, which are large
        log_probs, lens = log_probs[torch.tensor(fits, device=log_probs.device)], lens[fits]
    flat = torch.tensor([c for n in fits for c in targets[n]]).to(log_probs.device)
    sizes = lens.tolist(), [len(targets[n]) for n in fits]
    total = F.ctc_loss(log_probs.transpose(0, 1), flat, *sizes, blank, reduction="sum")
    return total, len(targets) - len(fits)


def ctc_min_frames(labels):
    """Frames that CTC needs: one a label, and one blank between equal neighbours."""
    return len(labels) + sum(a == b for a, b in itertools.pairwise(labels))


def ctc_paths(best, lens, blank):
    """Best classes (B, S) -> list of label lists: repeats merged, blanks dropped."""
    rows = [row[:length] for row, length in zip(best.tolist(), lens.tolist(), strict=True)]
    return [[c for c, _ in itertools.groupby(row) if c != blank] for row in rows]


def ctc_soft_speech(log_probs, best, lens, head):
    """CTC-compressed soft speech: one LLM embedding for each token that CTC hears.

    A run of equal non-blank best classes becomes the mean, over its positions, of the embeddings
    weighted by the posterior without blank: where CTC wavers, the LLM gets a mixture.
    Input   log_probs (B, S, C + 1); best (B, S), its argmax, and lens (B,), both on the CPU.
    Output  soft (B, K, D), lens (B,), at least 1 (where CTC hears nothing: the clip's mean).
    Source  arXiv:2102.01757, with embeddings of the LLM in place of encoder frames.
    """
    real = length_mask(lens, best.shape[1])
    spoken = real & (best != head.blank)
    spoken = torch.where(spoken.any(1, keepdim=True), spoken, real)  # silence is a run of its own
    starts = spoken & (best != F.pad(best, (1, 0), value=-1)[:, :-1])
    soft_lens = starts.sum(1)
    run = (starts.cumsum(1) - 1).clamp(min=0)  # (B, S): the run that a position belongs to
    weights = F.one_hot(run, int(soft_lens.max())) * spoken[..., None]  # (B, S, K)
    weights = (weights / weights.sum(1, keepdim=True).clamp(min=1)).to(log_probs.device)
    scores = log_probs[..., : head.blank]
    scores = scores.masked_fill(~real.to(scores.device)[..., None], 0.0)  # 0 x NaN would be NaN
    mean = weights.transpose(1, 2) @ scores.softmax(-1)  # (B, K, C)
    return mean @ head.rows[: head.blank], soft_lens


@dataclass
class Heard:
    """What an adaptor makes of a batch: for the LLM, and for CTC (None without a head)."""

    speech: torch.Tensor  # (B, K, D), what the LLM reads
    speech_lens: torch.Tensor  # (B,)
    lens: torch.Tensor  # (B,) adaptor positions
    log_probs: torch.Tensor | None = None  # (B, S, C + 1)
    paths: list | None = None  # CTC's greedy read-out, classes of each row


def hear(adaptor, ctc, enc, enc_lens, speech="frames", read_ctc=True):
    """Adaptor and CTC head. speech: the LLM reads the adaptor's "frames", or "ctc", soft speech.

    Without read_ctc there are no `paths`, which make the CPU wait for a GPU.
    """
    emb, lens = adaptor(enc, enc_lens)
    heard = Heard(emb, lens, lens)
    if ctc is not None:
        heard.log_probs = ctc(emb)
    if speech == "ctc" or ctc is not None and read_ctc:
        best = heard.log_probs.argmax(-1).cpu()
        heard.paths = ctc_paths(best, lens, ctc.blank)
    if speech == "ctc":
        heard.speech, heard.speech_lens = ctc_soft_speech(heard.log_probs, best, lens, ctc)
    return heard


# ---- LLM: loading, prompt, splice, loss, decoding ---------------------------


def load_llm(name, dtype=torch.float32, device="cpu", lora=None, chat=True):
    """Load a causal LLM, frozen for good, and its tokenizer.

    Input   lora: settings of peft.LoraConfig for a new one (fp32), or the folder of a trained one;
            chat: its tokenizer has to have a chat template.
    Output  (llm, tokenizer); with LoRA, `llm.peft` is the wrapper that saves or disables it.
    """
    from transformers import AutoModelForCausalLM

    folder = find_model(name)
    tokenizer = load_tokenizer(folder)
    if chat and tokenizer.chat_template is None:
        raise UserError(f"{folder}: its tokenizer has no chat template; use an instruct model")
    with loading(folder):
        llm = freeze(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    for key in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        if getattr(llm.config, key, None) not in (None, 1.0):  # losses here use lm_head alone
            raise UserError(f"{name}: its {key} changes the scores of lm_head; not supported")
    weights = hash_tensors({"embed": llm.get_input_embeddings().weight.bfloat16()})
    llm.identity = {"name": str(name), "weights": weights}
    if lora is not None:
        import peft

        if isinstance(lora, dict):
            try:
                wrapper = peft.get_peft_model(llm, peft.LoraConfig(task_type="CAUSAL_LM", **lora))
            except ValueError as error:  # of names that the LLM's layers do not have
                raise UserError(f"llm.lora: {' '.join(str(error).split())[:300]}") from error
        else:
            with loading(lora):
                wrapper = peft.PeftModel.from_pretrained(llm, lora)
        wrapper.peft_config["default"].base_model_name_or_path = str(name)
        llm.__dict__["peft"] = wrapper.eval()  # past nn.Module: the LLM is a part of its wrapper
    return llm.to(device), tokenizer


def load_phase2(folder, config, dtype, device="cpu", encoder_name="", llm_name=""):
    """Parts of a run folder of train_phase2.py, whose config.json is `config`, encoder,
    adaptor, CTC head (or None), LLM with its LoRA, tokenizer. Of them only the LLM is frozen.

    encoder_name, llm_name: where they lie now, if not where the configuration says.
    """
    found, lora = config["encoder"], Path(folder) / "lora"
    options = {key: found[key] for key in ("language", "text_norm", "pad_to_30s") if key in found}
    options["keep_query_frames"] = found.get("query_frames", False)
    encoder = load_encoder(encoder_name or found["name"], **options).to(device)
    lora = lora if lora.is_dir() else None
    llm, tokenizer = load_llm(llm_name or config["llm"]["name"], dtype, device, lora)
    loaded = {"encoder": encoder.identity, "llm": llm.identity}
    check_identity(config, loaded, f"{folder} (give encoder.name or llm.name)")
    table, path = llm.get_input_embeddings().weight, Path(folder) / "adaptor_phase2_final.pt"
    adaptor = AudioAdaptor(encoder.width, table.shape[1], **config["adaptor"])
    load_weights(adaptor, read_weights(path), path)
    head = path.with_name("ctc_head.pt")
    ctc = CTCHead.load(head, table) if head.is_file() else None
    return encoder, adaptor.to(device), ctc, llm, tokenizer


def save_lora(llm, folder, weights=None):
    """LoRA as a PEFT folder, whose files are whole when they move there; weights: of the LLM's own
    state dict, where that is cut."""
    folder.mkdir(exist_ok=True)
    weights = weights and {f"base_model.model.{name}": value for name, value in weights.items()}
    with tempfile.TemporaryDirectory(dir=folder.parent) as new:
        llm.peft.save_pretrained(new, state_dict=weights, save_embedding_layers=False)
        for path in Path(new).iterdir():
            os.replace(path, folder / path.name)


def end_of_turn(tokenizer):
    """Id of the token behind an answer in the chat template; a label, so that generation stops."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": AUDIO_MARK}]
    rest = tokenizer.apply_chat_template(turns, tokenize=False).split(AUDIO_MARK)[1]
    ids = tokenizer(rest, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("the chat template puts no token behind an answer; use an instruct model")
    return ids[0]


@functools.lru_cache(1024)  # most clips share a prompt, and a template takes its time
def build_prompt(tokenizer, prompt, language=None, hotwords=None, system=None):
    """The prompt of training and inference: `system | user: [hotwords] prompt AUDIO | assistant:`

    Input   prompt: `{language}` in it is replaced; hotwords: names that may occur, with commas
            between; system: None for the template's own.
    Output  (before, after): token ids on either side of the audio; thinking is off.
    """
    prompt = prompt.replace("{language}", language or "")
    if hotwords:
        header = "热词列表：" if is_cjk(prompt) else "Hotwords: "
        prompt = f"{header}[{hotwords}]\n{prompt}"
    system, prompt = (text and mark_special(tokenizer, text) for text in (system, prompt))
    turns = [] if system is None else [{"role": "system", "content": system}]
    text = tokenizer.apply_chat_template(
        [*turns, {"role": "user", "content": prompt + AUDIO_MARK}],
        tokenize=False, add_generation_prompt=True, enable_thinking=False,
    )  # fmt: skip
    halves = text.split(AUDIO_MARK)
    return tuple(turn_to_ids(tokenizer, half) for half in halves)


def text_to_ids(tokenizer, texts):
    """Token ids of transcripts: list of lists. Latin text gets a leading space, or a word would
    have other tokens at the beginning than within, and CTC would have to learn both. What looks
    like a special token is plain text."""
    texts = [text if not text or is_cjk(text) else f" {text}" for text in texts]
    plain = {"add_special_tokens": False, "split_special_tokens": True}
    return tokenizer(texts, **plain)["input_ids"] if texts else []


def mark_special(tokenizer, text):
    """Put PLAIN_MARK around what looks like a special token in a user's text, for turn_to_ids."""
    tokens = tokenizer.added_tokens_decoder.values()
    names = [re.escape(token.content) for token in tokens if token.special]
    text = text.replace(AUDIO_MARK, "").replace(PLAIN_MARK, "")
    return re.sub("|".join(names) or "(?!)", rf"{PLAIN_MARK}\g<0>{PLAIN_MARK}", text)


def turn_to_ids(tokenizer, text):
    """Token ids of a piece of a chat, its special tokens among them, except those marked."""
    ids = []
    for n, part in enumerate(text.split(PLAIN_MARK)):
        plain = {"add_special_tokens": False, "split_special_tokens": n % 2 == 1}
        ids += tokenizer(part, **plain)["input_ids"] if part else []
    return ids


@dataclass
class Spliced:
    """LLM inputs of a batch, [before | audio | after | target | pad], and labels on the target."""

    embeds: torch.Tensor  # (B, L, D)
    mask: torch.Tensor  # (B, L), 1 on real positions
    positions: torch.Tensor  # (B, L)
    labels: torch.Tensor  # (B, L) on the CPU, IGNORE where nothing is to be predicted


def splice(embed, prompts, emb, emb_lens, targets=None, pad_left=False):
    """splice_rows of one recording a row: between the halves of its prompt, its answer behind.

    Input   prompts: list of (before, after) id lists; targets: list of id lists that end with the
            end-of-turn token, or None to generate; the rest as there.
    """
    targets = [[] for _ in prompts] if targets is None else targets
    if not len(prompts) == len(targets) == len(emb):
        counts = f"{len(prompts)} prompts, {len(targets)} targets, audio {tuple(emb.shape)}"
        raise ValueError(f"splice: {counts}")
    pairs = [*zip(prompts, targets, strict=True)]
    rows = [[*before, AUDIO, *after, *target] for (before, after), target in pairs]
    labels = [[*[IGNORE] * (len(row) - len(t)), *t] for row, t in zip(rows, targets, strict=True)]
    return splice_rows(embed, rows, emb, emb_lens, labels, pad_left)


def splice_rows(embed, rows, emb, emb_lens, labels=None, pad_left=False):
    """LLM inputs of token ids among which recordings stand.

    Input   embed: the LLM's input embedding; rows: list of id lists with AUDIO in the place of each
            recording; emb (R, S, D), emb_lens (R,) on the CPU: the recordings of all rows in their
            order; labels: of each row, as long as it; pad_left: the padding stands in front.
    """
    lens, side = iter(emb_lens.tolist()), "left" if pad_left else "right"
    heard = sum(row.count(AUDIO) for row in rows)
    if not heard == len(emb) == len(emb_lens) or max(emb_lens, default=0) > emb.shape[1]:
        raise ValueError(f"splice: {rows} for audio {tuple(emb.shape)}, lengths {emb_lens}")
    spread = [torch.tensor([next(lens) if i == AUDIO else 1 for i in row]) for row in rows]
    wide = [torch.tensor(row).repeat_interleave(n) for row, n in zip(rows, spread, strict=True)]
    labels = labels or [[IGNORE] * len(row) for row in rows]
    labels = [torch.tensor(x).repeat_interleave(n) for x, n in zip(labels, spread, strict=True)]
    # all is laid out on the CPU: a GPU is handed a few tensors, not a few for every row
    ids = pad_sequence(wide, True, IGNORE, side)  # (B, L)
    labels = pad_sequence(labels, True, IGNORE, side)
    source = length_mask(emb_lens, emb.shape[1]).flatten().nonzero()[:, 0]  # in (R * S, D)
    places = (ids.flatten() == AUDIO).nonzero()[:, 0]  # in (B * L, D)
    laid_out = ids.clamp(min=0), (ids != IGNORE).long(), source, places
    ids, mask, source, places = (x.to(emb.device, non_blocking=True) for x in laid_out)
    words = embed(ids) * mask[..., None]  # (B, L, D)
    audio = emb.flatten(0, 1)[source].to(words.dtype)
    embeds = words.flatten(0, 1).index_copy(0, places, audio).view(words.shape)
    return Spliced(embeds, mask, (mask.cumsum(1) - 1).clamp(min=0), labels)


def hidden_states(llm, embeds):
    """Last hidden states (B, L, D) of right-padded rows: a causal LLM needs no mask for those."""
    from transformers import DynamicCache

    # without mask and cache, transformers asks the GPU whether rows are packed, and waits for it
    cache = DynamicCache(config=llm.config)
    cache.update = lambda keys, values, *_, **__: (keys, values)
    return llm.model(inputs_embeds=embeds, cache=cache, use_cache=True).last_hidden_state


def label_logits(llm, spliced):
    """Logits of right-padded rows on label positions only, (label tokens, V) fp32, and labels."""
    labels, device = spliced.labels[:, 1:], spliced.embeds.device  # position l predicts l + 1
    row, column = (labels != IGNORE).nonzero(as_tuple=True)
    places = (row * spliced.embeds.shape[1] + column).to(device, non_blocking=True)
    target = labels[row, column].to(device, non_blocking=True)
    hidden = hidden_states(llm, spliced.embeds).flatten(0, 1)[places]  # (label tokens, D)
    return llm.lm_head(hidden).float(), target


def transcript_loss(llm, spliced, label_smoothing=0.0):
    """Cross-entropy of the labels through the LLM.

    Output  sum of the CE in nats, number of label tokens, number of them predicted right.
    """
    logits, target = label_logits(llm, spliced)
    loss = F.cross_entropy(logits, target, reduction="sum", label_smoothing=label_smoothing)
    return loss, len(target), (logits.argmax(-1) == target).sum()


@torch.no_grad()
def greedy_decode(llm, spliced, stop_id, caps):
    """Greedy answers with a key-value cache; rows leave as soon as they are finished.

    Input   spliced: left-padded; caps: most tokens of each row.
    Output  list of id lists without the stop token; what repeats itself is cut (add_token).
    """
    from transformers import DynamicCache

    cache, mask, position = DynamicCache(config=llm.config), spliced.mask, spliced.positions
    inputs, answers = {"inputs_embeds": spliced.embeds}, [[] for _ in caps]
    rows = list(range(len(caps)))  # those that are still written
    while rows:
        inputs |= {"attention_mask": mask, "position_ids": position, "cache": cache}
        hidden = llm.model(**inputs, use_cache=True).last_hidden_state
        tokens = llm.lm_head(hidden[:, -1]).float().argmax(-1)  # (rows,)
        said = zip(rows, tokens.tolist(), strict=True)
        stays = [add_token(answers[row], token, stop_id, caps[row]) for row, token in said]
        keep = torch.tensor(stays, device=tokens.device).nonzero()[:, 0]
        if len(keep) < len(rows):
            cache.batch_select_indices(keep)
        rows = list(itertools.compress(rows, stays))
        inputs, position = {"input_ids": tokens[keep, None]}, position[keep, -1:] + 1
        mask = F.pad(mask[keep], (0, 1), value=1)
    return answers


def token_cap(seconds, tokens_per_s=12.0, ctc_tokens=None):
    """Most new tokens for a clip; where CTC has counted them, half as many again and four."""
    cap = 8 + math.ceil(tokens_per_s * seconds)
    return cap if ctc_tokens is None else min(cap, 4 + math.ceil(1.5 * ctc_tokens))


def add_token(answer, token, stop_id, cap):
    """Append a token. False ends the answer: the stop token (left out), a loop (cut), the cap."""
    if token == stop_id:
        return False
    answer.append(token)
    looped, capped = cut_loop(answer), len(answer) >= cap
    while capped and cut_loop(answer, least=2, tokens=2):  # here two copies are one too many
        pass
    return not (looped or capped)


def cut_loop(ids, longest=32, least=3, tokens=16):
    """Cut a runaway loop in place, to one copy of what was said `least` times; True if it did.

    It has 16 tokens or more: "zero zero zero zero" is a phone number.
    """
    for n in range(1, longest + 1):
        times = max(least, -(-tokens // n))
        tail = ids[-n * times :]
        if len(tail) == n * times and tail == tail[:n] * times:
            del ids[len(ids) - n * (times - 1) :]
            return True
    return False


# ---- text and scores --------------------------------------------------------


def is_cjk(text):
    """True if the first character is Chinese, Japanese or Korean: no spaces between words."""
    return bool(re.match(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]", text))


def normalize_text(text):
    """The normaliser of training targets and scores: NFKC, lower case, no punctuation.

    "don't" keeps its apostrophe; spaces beside Chinese go; "5" and "five" differ.
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("’", "'")
    kept = (c if c == "'" or unicodedata.category(c)[0] not in "PSCZ" else " " for c in text)
    text = " ".join(filter(None, (word.strip("'") for word in "".join(kept).split())))
    return re.sub(r"(?<=[\u3400-\u9fff]) | (?=[\u3400-\u9fff])", "", text)


def score_units(text, characters):
    """What an error rate counts: characters without spaces, or words."""
    return list(text.replace(" ", "")) if characters else text.split()


def error_rate(references, hypotheses, normalize=normalize_text, characters=None):
    """Corpus error rate by jiwer: CER for Chinese, Japanese and Korean references, else WER.

    Input   characters: True or False for one of them on all clips.
    Output  dict name (of most references' rate: "cer" or "wer"), rate, errors, substitutions,
            deletions, insertions, units, empty (references, which count too).
    """
    import jiwer

    sides, cjk = ([], []), []
    for pair in zip(references, hypotheses, strict=True):
        pair = [normalize(text) for text in pair]
        cjk.append(any(map(is_cjk, pair[0])) if characters is None else characters)
        for side, text in zip(sides, pair, strict=True):
            side.append(" ".join(score_units(text, cjk[-1])))
    found = jiwer.process_words(*sides)
    counts = {kind: getattr(found, kind) for kind in ("substitutions", "deletions", "insertions")}
    errors, units = sum(counts.values()), found.hits + found.substitutions + found.deletions
    rate = errors / units if units else math.inf if errors else 0.0
    counts |= {"units": units, "empty": sides[0].count("")}
    name = "cer" if 2 * sum(cjk) > len(cjk) else "wer"
    return {"name": name, "rate": rate, "errors": errors} | counts


# ---- manifests --------------------------------------------------------------

FIELDS = ("key", "source", "target", "language", "prompt", "hotwords", "asr_hotwords", "question",
          "channel", "where")  # fmt: skip
NUMBERS = ("start", "end", "duration")  # in seconds; start and end: the part of `source` meant
TAGS = r"<\|[^|<>]*\|>"  # as SenseVoice writes them: <|zh|><|NEUTRAL|>
AISHELL_TEXT = "transcript/aishell_transcript_v0.8.txt"
KALDI = ("wav.scp", "text", "segments", "reco2file_and_channel")
FORMS = ".jsonl, .json, Kaldi, data_aishell:train, Parquet, save_to_disk, hf:NAME:SPLIT"


def file_stamp(path):
    """What another file, or a changed one, has not in common with it."""
    stat = os.stat(path) if os.path.isfile(path) else None
    return [str(path), stat and stat.st_size, stat and stat.st_mtime_ns]


def read_manifest(spec, cache_dir, columns=("audio", "text", "question"), strip_tags=False):
    """Read a list of clips, in any of the accepted forms, as a memory-mapped Hugging Face Dataset.

    spec    a JSONL file (ours, NeMo's, or FunASR's chat lines), Kaldi's wav.scp or its folder, an
            AISHELL-1 folder with its part (`data_aishell:train`), a folder of Parquet files or of
            `save_to_disk`, or `hf:NAME:SPLIT`. Of the last three, columns names audio, text and
            question; their audio comes as `audio`, as load_audio takes it.
    Output  columns FIELDS, text or null, and NUMBERS. Kept in cache_dir, made again when the files
            change. Tags in targets are counted, and taken out with strip_tags.
    Raises  UserError naming file, line and field. Audio is not looked at here.
    """
    import datasets

    datasets.disable_progress_bars()
    Path(cache_dir).mkdir(parents=True, exist_ok=True)
    path, (folder, _, part) = Path(spec), str(spec).rpartition(":")
    if folder and Path(folder).is_dir():
        files = [Path(folder, AISHELL_TEXT), *sorted(Path(folder, "wav", part).glob("*/*.wav"))]
        make = aishell_rows
    elif (path / "wav.scp").is_file() or path.name == "wav.scp":
        make, files = kaldi_rows, [(path if path.is_dir() else path.parent) / n for n in KALDI]
    elif path.is_file():
        make, files = jsonl_rows, [path]
    else:
        return without_tags(read_table(str(spec), columns), spec, strip_tags)
    kinds = {name: datasets.Value("string") for name in FIELDS}
    kinds |= {name: datasets.Value("float64") for name in NUMBERS}
    mark = hash_text([[file_stamp(file) for file in files], FIELDS, NUMBERS])
    remarks = Path(cache_dir) / f"remarks-{mark}.json"
    try:
        rows = datasets.Dataset.from_generator(
            unique_rows, datasets.Features(kinds), str(cache_dir), fingerprint=mark,
            gen_kwargs={"rows": make, "spec": str(spec), "remarks": remarks},
        )  # fmt: skip
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ or error from None
    for text in json.loads(remarks.read_text(encoding="utf-8")) if remarks.is_file() else ():
        note(f"{spec}: {text}")
    return without_tags(rows, spec, strip_tags)


def without_tags(rows, spec, strip):
    """Count the targets with tags, say so, and take the tags out if that is wished."""
    import pyarrow.compute

    tagged = pyarrow.compute.match_substring_regex(rows.data.column("target"), TAGS)
    if not (count := pyarrow.compute.sum(tagged).as_py()):
        return rows
    done = "are taken out" if strip else "stay; strip_tags in training takes them out"
    note(f"{spec}: {count} targets hold tags such as <|zh|>, which {done}")
    if not strip:
        return rows
    texts = [text and re.sub(TAGS, "", text).strip() for text in rows["target"]]
    return rows.remove_columns("target").add_column("target", texts)


def with_seconds(rows, cache_dir):
    """A manifest with `seconds` of each clip, and the `reason` of those that cannot be read: found
    once, and kept until a file changes."""
    import datasets

    def measure(row):
        try:
            return {"seconds": clip_seconds(row), "reason": ""}
        except AudioError as error:
            return {"seconds": 0.0, "reason": str(error)}

    stamps = [file_stamp(path) for path in sorted({*rows["source"]} - {None})]
    mark = hash_text([rows._fingerprint, stamps, "seconds"])
    kinds = {"seconds": datasets.Value("float64"), "reason": datasets.Value("string")}
    found = rows.map(
        measure, remove_columns=rows.column_names, features=datasets.Features(kinds),
        new_fingerprint=mark, cache_file_name=f"{cache_dir}/seconds-{mark}.arrow",
    )  # fmt: skip
    return datasets.concatenate_datasets([rows, found], axis=1)


def unique_rows(rows, spec, remarks):
    """Rows of a manifest under FIELDS and NUMBERS, every key once; what else `rows` yields is text,
    kept in the file `remarks`."""
    seen, said = {}, []
    for row in tqdm(rows(spec), f"reading {spec}", unit=" clips", delay=5, disable=None):
        if isinstance(row, str):
            said.append(row)
            continue
        key, where, start, end = row["key"], row["where"], row.get("start"), row.get("end")
        if (first := seen.setdefault(key, where)) != where:
            raise UserError(f"{where}: key {key!r} stands at {first} too")
        if not 0 <= (start or 0.0) < (math.inf if end is None else end):
            raise UserError(f"{where}: no part of a recording goes from {start} to {end} s")
        texts = {name: row.get(name) for name in FIELDS}
        texts = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in texts.items()}
        yield texts | {name: row.get(name) for name in NUMBERS}
    if said:
        save(remarks, said)
    if not seen:
        raise UserError(f"{spec}: {'; '.join(['holds no clips', *said])}")


def read_lines(path):
    r"""(where, line) of a UTF-8 file, cut at "\n" only: U+2028 may stand inside a transcript."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{Path(path).name}:{number}", line.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from error


def jsonl_rows(path):
    """Rows of our own, of NeMo (audio_filepath, text, offset) and of FunASR's chat (messages)."""

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a field is given twice")
        return dict(pairs)

    unused = {}  # what of FunASR's rows is not used: where it stands
    for where, line in read_lines(path):
        try:
            row = json.loads(line, object_pairs_hook=unique)
            if "messages" in row:
                row, others = chat_row(row)
                for text in others:
                    unused.setdefault(text, []).append(where)
                if row is None:
                    continue
            elif "audio_filepath" in row:
                row |= {"source": row["audio_filepath"], "target": row["text"]}
                row["start"] = row.get("offset")
            if row.keys() & {"messages", "audio_filepath"}:  # they have no keys
                row.setdefault("key", f"{Path(row['source']).stem}-{where.rpartition(':')[2]}")
            if wrong := [f for f in ("source", "target", "key") if not isinstance(row.get(f), str)]:
                raise ValueError(f"{wrong[0]!r} is missing or no text")
            row |= {k: float(row[k]) for k in NUMBERS if row.get(k) is not None}
            if row.get("start") is not None and row.get("end") is None and row.get("duration"):
                row["end"] = row["start"] + row["duration"]
            row["channel"] = None if row.get("channel") is None else str(int(row["channel"]))
            "".join(map(str, row.values())).encode()  # half a character, "\\ud83d", is no text
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: not a clip ({error})") from error
        yield row | {"source": os.path.join(os.path.dirname(path), row["source"]), "where": where}
    yield from (f"{len(at)} rows, {at[0]} for one: {text}" for text, at in unused.items())


def chat_row(row):
    """FunASR's turn `hotwords, prompt <|startofspeech|>!path<|endofspeech|>`, and its answer.

    Output  the row with our fields (None: of no use), and what of it is not used.
    """
    speech = r"<\|startofspeech\|>!?(.*?)<\|endofspeech\|>"
    turns = [(turn["role"], turn["content"]) for turn in row["messages"]]
    heard = [n for n, (role, text) in enumerate(turns) for _ in re.findall(speech, text)]
    if len(heard) != 1 or [role for role, _ in turns[heard[0] :][:2]] != ["user", "assistant"]:
        return None, ["left out, not one recording and its answer"]
    at, (_, text), (_, answer) = heard[0], *turns[heard[0] :][:2]
    prompt, found = re.sub(speech, "", text).strip(), {"target": answer}
    if hotwords := re.match(r"(?s)(?:.*\n)?热词列表：\[(.*?)\]\s*", prompt):
        prompt, found["hotwords"] = prompt[hotwords.end() :], hotwords[1]
    others = {*turns[:at], *turns[at + 2 :]} - {("system", "You are a helpful assistant.")}
    unused = [f"a turn of the {role} is not used" for role in sorted({role for role, _ in others})]
    found |= {"source": re.search(speech, text)[1], "prompt": prompt or row.get("prompt")}
    return row | found, unused


def kaldi_rows(spec):
    """Kaldi's folder, or its wav.scp: clips are its segments, or whole recordings."""
    folder = spec if os.path.isdir(spec) else os.path.dirname(spec)

    def table(name):
        found, path = {}, os.path.join(folder, name)
        for where, line in read_lines(path) if os.path.isfile(path) else ():
            key, rest = (line.split(maxsplit=1) + [""])[:2]
            if key in found:
                raise UserError(f"{where}: {key} stands at {found[key][0]} too")
            found[key] = where, rest
        return found

    wavs, texts, segments, channels = map(table, KALDI)
    for where, source in wavs.values():
        if not source or source.endswith("|") or re.search(r"\.ark:\d+", source):
            raise UserError(f"{where}: a plain path expected, no pipe and no archive")
    for key, (where, rest) in (segments or wavs).items():
        row, recording = {"key": key, "where": where, "target": texts.pop(key, ("", None))[1]}, key
        try:
            if segments:
                recording, start, end = rest.split()
                row |= {"start": float(start), "end": float(end) if float(end) != -1 else None}
            row["source"] = os.path.join(folder, wavs[recording][1])
            if recording in channels:
                where, rest = channels[recording]
                row["channel"] = {"1": "A", "2": "B", "A": "A", "B": "B"}[rest.split()[-1]]
        except (ValueError, LookupError) as error:
            raise UserError(f"{where}: no segment or side of a recording ({error})") from error
        yield row
    if texts:
        yield f"{len(texts)} lines of `text` have no recording, {min(texts)} for one"


def aishell_rows(spec):
    """AISHELL-1 as it unpacks; the few clips without a transcript have no target."""
    folder, _, part = spec.rpartition(":")
    lines = read_lines(f"{folder}/{AISHELL_TEXT}")
    texts = {key: "".join(words) for key, *words in (line.split() for _, line in lines)}
    for path in sorted(Path(folder, "wav", part).glob("*/*.wav")):
        row = {"key": path.stem, "source": str(path), "target": texts.get(path.stem)}
        yield row | {"language": "zh", "where": str(path)}


def read_table(spec, columns):
    """Parquet or `save_to_disk` folders, or a data set of the hub, under our column names."""
    import datasets

    try:
        if hub := re.fullmatch("hf:([^:]+):([^:]+)", spec):
            rows = datasets.load_dataset(hub[1], split=hub[2])
        elif parquet := sorted(map(str, Path(spec).rglob("*.parquet"))):
            rows = datasets.Dataset.from_parquet(parquet)  # kept in datasets' own cache, once
        else:
            folders = sorted(path.parent for path in Path(spec).rglob("dataset_info.json"))
            rows = datasets.concatenate_datasets([datasets.load_from_disk(f) for f in folders])
    except Exception as error:  # of many types; the remedy is the same
        reason = " ".join(str(error).split())
        raise UserError(f"{spec}: is none of {FORMS} ({reason})") from error
    for name, wanted in zip(columns, ("audio", "text"), strict=False):
        if name not in rows.column_names:
            raise UserError(f"{spec}: no column {name!r} in {', '.join(rows.column_names)}")
        kind, texts = rows.features[name], ("string", "large_string")
        if getattr(kind, "dtype", "") not in texts and (
            wanted == "text" or isinstance(kind, datasets.Value) and kind.dtype != "binary"
        ):
            raise UserError(f"{spec}: column {name!r} holds {kind}, no {wanted}")
    if isinstance(rows.features[columns[0]], datasets.Audio):
        rows = rows.cast_column(columns[0], datasets.Audio(decode=False))
    where = [f"{spec}:{number}" for number in range(len(rows))]
    keys = list(map(str, rows["key"])) if "key" in rows.column_names else where
    taken = dict(zip(columns, ("audio", "target", "question"), strict=True))
    taken |= {name: name for name in ("language", "prompt", "hotwords", "asr_hotwords")}
    taken = {theirs: name for theirs, name in taken.items() if theirs in rows.column_names}
    rows = rows.select_columns(list(taken)).rename_columns(taken)
    for name in sorted({*FIELDS, *NUMBERS} - set(taken.values())):
        given = {"key": keys, "where": where}.get(name, [None] * len(where))
        rows = rows.add_column(name, given)
    return rows


# ---- the cache of encoder outputs, and the order of batches -----------------

CLIP_TEXTS = ("key", "target", "language", "prompt", "hotwords")
CLIP_NUMBERS = ("shard", "number", "frames", "seconds")


def open_shard(path, remedy="delete it, run precompute.py again"):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: torn ({error}); {remedy}") from error


class EncoderCache:
    """What precompute.py wrote: shards in safetensors, a clip's output (T, W) fp16 by number."""

    keep_open = staticmethod(functools.lru_cache(256)(open_shard))  # precompute.py replaces shards

    def __init__(self, folder):
        path = Path(folder) / "cache.json"
        if not path.is_file():
            raise UserError(f"{folder}: no cache; run precompute.py with cache.dir={folder} first")
        self.identity = json.loads(path.read_text(encoding="utf-8"))
        if self.identity.get("format") != FORMAT:
            raise UserError(f"{folder}: made by an earlier layout; run precompute.py again")
        self.encoder = self.identity["encoder"]
        self.paths = sorted(Path(folder).glob("shard-*.safetensors"))

    def index(self):
        """{key: (shard, number, frames, seconds)}."""
        found = {}
        for shard, path in enumerate(self.paths):
            clips = json.loads(open_shard(path).metadata()["rows"])["clips"]
            for number, (key, _, frames, seconds) in enumerate(clips):
                found[key] = shard, number, frames, seconds
        return found

    def read(self, shard, number):
        return self.keep_open(self.paths[shard]).get_tensor(str(number))


def cached_clips(
    specs, cache, tokenizer, cache_dir, normalize=True, strip_tags=False, speeds=(1.0,)
):
    """Manifests -> Dataset of the clips that the cache holds, tokenised once and memory-mapped.

    Columns ids, CLIP_TEXTS and CLIP_NUMBERS; a row for each of the `speeds` that precompute.py has
    made. A manifest named twice counts twice. What is not cached, or has no text, is counted.
    """
    import datasets

    kinds = {name: datasets.Value("string") for name in CLIP_TEXTS}
    kinds |= {name: datasets.Value("int64") for name in ("row", *CLIP_NUMBERS[:3])}
    kinds |= {"seconds": datasets.Value("float64"), "ids": datasets.List(datasets.Value("int32"))}
    made_of = [normalize, list(speeds), tokenizer.backend_tokenizer.to_str()]
    made_of += [(str(path), path.stat().st_mtime_ns) for path in cache.paths]
    index = functools.cache(cache.index)

    def prepare(rows, places):
        clips = []
        texts = [text or "" for text in rows["target"]]  # a data set's may be null
        targets = [normalize_text(text) if normalize else text.strip() for text in texts]
        for n, ids in enumerate(text_to_ids(tokenizer, targets)):
            for speed in speeds if ids else ():
                key = rows["key"][n] + (f"@{speed}" if speed != 1.0 else "")
                if found := index().get(key):
                    clip = {name: rows[name][n] for name in CLIP_TEXTS} | {"row": places[n]}
                    clip |= dict(zip(CLIP_NUMBERS, found, strict=True))
                    clips.append(clip | {"key": key, "target": targets[n], "ids": ids})
        return {name: [clip[name] for clip in clips] for name in kinds}

    parts, rank = [], dist.get_rank() if dist.is_initialized() else 0
    if rank > 0:
        dist.barrier()  # process 0 reads and tokenises; the others find what it has made
    for spec in as_list(specs):
        rows = read_manifest(spec, cache_dir, strip_tags=strip_tags)
        rows = rows.select_columns(list(CLIP_TEXTS))  # no audio
        name = hash_text([rows._fingerprint, made_of])
        clips = rows.map(
            prepare, with_indices=True, batched=True, batch_size=4096,
            features=datasets.Features(kinds), remove_columns=rows.column_names,
            new_fingerprint=name, cache_file_name=f"{cache_dir}/clips-{name}.arrow",
        )  # fmt: skip
        missing = len(rows) - len(np.unique(clips.data.column("row").to_numpy()))
        if rank == 0 and missing:
            print(f"{spec}: {missing} of {len(rows)} clips are not cached, or have no text")
        parts.append(clips)
    if rank == 0 and dist.is_initialized():
        dist.barrier()
    clips = datasets.concatenate_datasets(parts)
    if not len(clips):
        raise UserError(f"{specs}: not one clip with text is in the cache; run precompute.py")
    return clips


def length_batches(lengths, budget, world, seed, epoch, most=sys.maxsize):
    """One epoch as groups of `world` batches, one batch for each process of a step.

    Clips of like length share a batch, and like batches a group, so that no process waits for
    another's long clips. A function of seed and epoch: to resume, skip the groups used.
    Input   lengths: frames (or positions) of each clip; budget: padded ones of a batch, at most;
            most: clips of a batch.
    Raises  UserError for a clip over the budget, or too few clips for every process.
    """
    lengths = np.asarray(lengths)
    if lengths.max(initial=0) > budget:
        raise UserError(f"a clip has {lengths.max()} positions, a batch at most {budget}")
    rng = np.random.default_rng([seed, epoch])
    noisy = lengths * rng.uniform(0.98, 1.02, len(lengths))  # else all epochs have the same batches
    count = max(lengths.sum() / budget, len(lengths) / most) / world  # of groups, about
    pools = np.array_split(rng.permutation(len(lengths)), max(1, int(count) // 64))
    batches, batch, longest = [], [], 0
    # up and down in turns, so that pools meet where clips are alike
    order = [pool[np.argsort(noisy[pool])][:: 1 - 2 * (n % 2)] for n, pool in enumerate(pools)]
    for clip in np.concatenate(order).tolist():
        longest = max(longest, lengths[clip])
        if batch and (longest * (len(batch) + 1) > budget or len(batch) == most):
            batches.append(batch)
            batch, longest = [], lengths[clip]
        batch.append(clip)
    batches.append(batch)
    for _ in range(len(batches) % world):  # what cannot be shared out waits for another epoch
        batches.pop(rng.integers(len(batches)))
    if not batches or not batches[0]:
        raise UserError(f"{len(lengths)} clips do not fill a batch for each of {world} processes")
    groups = [batches[first : first + world] for first in range(0, len(batches), world)]
    groups = [groups[n] for n in rng.permutation(len(groups))]
    if epoch == 0:  # if memory does not suffice, the run ends in its first step, not in its last
        cost = [max(len(b) * lengths[b].max() for b in group) for group in groups]
        groups.insert(0, groups.pop(int(np.argmax(cost))))
    return groups


def endless_groups(groups_of, epoch, used):
    """Sampler of a DataLoader: (epoch, number, group) for ever. groups_of: epoch -> its groups."""
    while True:
        groups = groups_of(epoch)
        for number in range(used, len(groups)):
            yield epoch, number, groups[number]
        epoch, used = epoch + 1, 0
