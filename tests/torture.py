"""Kill -9 at random moments, a full disk, a read-only folder: nothing is lost, not one bit.

    python tests/torture.py [SCRIPT ...]                  # or make torture ARGS="infer precompute"

Small twins of the models, a few clips. A script runs once undisturbed; then the same command is
started and killed again and again, every other time inside a save, until it ends: its files then
equal the undisturbed run's, a start has never undone what an earlier one had saved, and temporary
files are gone. On a full disk (a small tmpfs) and in a read-only folder a script ends in one line
with status 2, what was there is whole, and with room the same command finishes, equal again.
Scripts run in forks of this process, which has imported torch and transformers once.
"""

import atexit
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

ROOT, WORK = Path(__file__).parents[1], Path(tempfile.mkdtemp(prefix="torture-"))
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HOME": f"{WORK}/hub"}
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU does not outlive a fork

import make_twins  # noqa: E402
import matplotlib.font_manager  # noqa: E402, F401
import peft  # noqa: E402, F401
import test_duplex  # noqa: E402
import torch  # noqa: E402
import transformers.models.qwen3.modeling_qwen3  # noqa: E402

import infer  # noqa: E402, F401
import train_duplex  # noqa: E402, F401
import train_salm  # noqa: E402, F401
import train_steermoe  # noqa: E402, F401

KILLS, IN_SAVE, SEED = 20, 5, 0  # at least so many kills, so many of them inside a save
TIMES = r'"(spent|audio_s_per_s|elapsed_s|rtf|seconds|gib)": [^,}]+|[0-9.]+ (s|GiB)\b'  # and memory
PHASE = """cache.dir={work}/precompute/whole/run data.train={wavs} data.valid={wavs} workers=0
    llm.name={qwen3} adaptor.hidden_dim=32 adaptor.num_layers=1 adaptor.num_heads=4 adaptor.stack=2
    batch_clips=4 augment.time_masks=1 augment.feature_noise=0.1 loss.ctc_weight=0.3
    optim.warmup_steps=2 optim.max_steps=12 run.log_every=2 run.valid_every=4 run.save_every=2
    run.dir=DIR run.resume=true"""
SIZES = " ".join(f"audio_encoder_conf.{key}={value}" for key, value in make_twins.ENCODER.items())
for part, width in (("audio_adaptor_conf", 48), ("ctc_decoder_conf", 32)):
    SIZES += f" {part}.llm_dim={width} {part}.ffn_dim=64 {part}.encoder_dim=32"
JOBS = {  # results in DIR, the rest beside it; the later ones need the first and the third
    "precompute": "data.train={wavs} encoder.name={whisper} cache.dir=DIR cache.shard_clips=2",
    "train_phase1": PHASE,
    "train_phase2": f"{PHASE} llm.lora.r=2 llm.lora.dropout=0.1",
    "infer": """{wavs} model.dir={work}/train_phase2/whole/run batch_s=1.5 workers=0
        out=DIR/x.jsonl,DIR/x.srt,DIR/x.txt,DIR/x.json""",
    "finetune_encoder": f"""{ROOT}/configs/stage1.yaml {SIZES} init_param={{official}}/model.pt
        train_data_set_list={{calls}} valid_data_set_list={{calls}} llm=none output_dir=DIR
        dataset_conf.batch_size_sample_max=4 dataset_conf.num_workers=0 telephone_conf.prob=0.5
        scheduler_conf.warmup_steps=2 train_conf.log_interval=1 train_conf.max_steps=10
        train_conf.validate_interval=4 train_conf.save_checkpoint_interval=3
        train_conf.keep_nbest_models=2""",
    "train_steermoe": """llm_decoder.model_name={qwen3} whisper_encoder.model_path={whisper}
        training.fp16=false parquet_dirs={wavs} eval_dirs={wavs} training.output_dir=DIR
        training.warmup_steps=2 logging_steps=2 save_steps=2 eval_steps=4 max_steps=10 workers=0
        use_early_stopping=false steering_log_interval=4 resume=true""",
    "train_salm": """model.pretrained_llm={qwen3} model.pretrained_asr={whisper} save_every=2
        data.train_ds.manifest_filepath={wavs}
        data.validation_ds.datasets.a.manifest_filepath={wavs}
        data.train_ds.num_workers=0 data.validation_ds.num_workers=0 trainer.accelerator=cpu
        data.validation_ds.max_new_tokens=5 data.train_ds.batch_size=4 trainer.max_steps=10
        trainer.val_check_interval=4 trainer.log_every_n_steps=2 model.lora.r=2
        model.lora.lora_dropout=0.1 model.perception.modality_adapter.d_model=32
        loss.distill_weight=1 model.lr_scheduler.warmup_steps=2 exp_manager.explicit_log_dir=DIR""",
    "train_duplex": """model.pretrained_llm={qwen3} model.pretrained_asr=scratch save_every=2
        model.pretrained_audio_codec={mimi} model.num_codebooks=2 model.text_bos=<|im_start|>
        model.text_eos=<|im_end|> model.text_pad=<|endoftext|> trainer.max_steps=10
        model.perception.modality_adapter._target_=IdentityConnector trainer.accelerator=cpu
        model.perception.encoder.hidden=16 model.perception.encoder.dropout=0.1
        data.train_ds.manifest_filepath={dialogues} data.source_sample_rate=8000
        data.validation_ds.datasets.a.manifest_filepath={dialogues} data.train_ds.batch_size=2
        data.train_ds.num_workers=0 data.validation_ds.num_workers=0 trainer.val_check_interval=4
        trainer.log_every_n_steps=2 model.user_ctc_weight=0.5 model.code_noise=0.1
        model.speech_decoder.d_model=32 model.speech_decoder.n_layers=1
        model.speech_decoder.n_heads=2 exp_manager.explicit_log_dir=DIR""",
}


def start(name, world, folder, directory="run"):
    """Fork a child that does as `python NAME.py ...` in a folder. Output: its process id."""
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    if pid := os.fork():
        os.setpgid(pid, pid)  # its readers are killed with it
        return pid
    code = 1
    try:
        streams = [open(WORK / f"{name}.{ending}", "w") for ending in ("out", "err")]
        for number, stream in enumerate(streams, start=1):
            os.dup2(stream.fileno(), number)
        torch.set_num_threads(1)
        os.chdir(folder)
        sys.argv = [f"{name}.py", *JOBS[name].format(**world).replace("DIR", directory).split()]
        runpy.run_path(f"{ROOT}/{name}.py", run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # readers end
        sys.stdout.flush()
        os._exit(code)


def watch(pid, folder, moment=float("inf"), in_save=False, delay=0.0):
    """A child's exit status; None if it was killed: after `moment` seconds, or in the next save."""
    ends = time.monotonic() + moment
    while not (found := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() >= ends and (not in_save or temporaries(folder, pid)):
            time.sleep(delay)
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.0003)
    return os.waitstatus_to_exitcode(found[1])


def temporaries(folder, pid=""):
    run = folder / "run"
    return [name for name in (os.listdir(run) if run.is_dir() else ()) if f".tmp{pid}" in name]


def progress(folder):
    """Steps, or shards and lines, that are saved; fails where last.pt is not whole."""
    if (folder / "run" / "last.pt").exists():
        return torch.load(folder / "run" / "last.pt", weights_only=True)["step"]
    lines = [path.read_bytes().count(b"}\n") for path in folder.glob("run/x.jsonl")]
    return sum(lines) + len(list(folder.glob("run/shard-*.safetensors")))


def results(folder):
    """{file: its content as text} of a run, without what tells of times and processes."""
    found = {}
    for path in filter(Path.is_file, folder.glob("run/**/*")):
        name, content = str(path.relative_to(folder / "run")), path.read_text("latin1")
        if path.suffix == ".pt":
            content = torch.load(path, weights_only=True)
        elif name in ("metrics.jsonl", "steering.jsonl"):  # of a step, the last row counts
            rows = list(map(json.loads, content.splitlines()))
            content = {f"{row['step']} {[*row]}": row for row in rows}
        elif path.suffix == ".json":
            content = json.loads(content)
        if not name.startswith(("lock", "events", "manifests/")):
            plain = json.dumps(content, default=torch.Tensor.tolist)
            found[name] = "" if path.suffix == ".png" else re.sub(TIMES, "", plain)
    return found


def said(name):
    return (WORK / f"{name}.err").read_text()


def unequal(name, status, folder):
    """What is wrong with a run that should have ended as the undisturbed one has."""
    if status:
        return [f"status {status}, {said(name)[-400:]!r}"]
    one, two = results(folder), results(WORK / name / "whole")
    wrong = sorted(file for file in one.keys() | two.keys() if one.get(file) != two.get(file))
    return [f"{file} is not equal, or should not be" for file in wrong]


def unclear(name, status):
    """What is wrong with how a run has ended that could not write."""
    if status == 2 and re.fullmatch("error: .*\n", said(name)):
        return []
    return [f"status {status} in place of one line and 2: {said(name)[-400:]!r}"]


def kill_often(name, world, seconds):
    """Output: kills, those inside a save, runs that came to their end, faults."""
    rng, kills, in_save, runs, faults = random.Random(f"{SEED} {name}"), 0, 0, 0, []
    while kills < KILLS or in_save < IN_SAVE:
        folder, saved, status, runs = WORK / name / f"killed{runs}", 0, None, runs + 1
        while status is None:
            enough = kills >= KILLS and in_save >= IN_SAVE
            moment = float("inf") if enough else rng.uniform(0, 1.3 * seconds)
            pid = start(name, world, folder)
            status = watch(pid, folder, moment, kills % 2 == 1, rng.uniform(0, 0.002))
            mine, left = temporaries(folder, pid), temporaries(folder)
            kills, in_save = kills + (status is None), in_save + bool(mine)
            if mine and mine != left:
                faults.append(f"run {runs}, kill {kills}: {left} were not removed")
            if (now := progress(folder)) < saved:
                faults.append(f"run {runs}, kill {kills}: {saved} saved, then {now}")
            saved = now
        faults += [f"run {runs}, end: {fault}" for fault in unequal(name, status, folder)]
    return kills, in_save, runs, faults


def starve(name, world):
    """Runs, new or begun, on a disk that is full (with room for a share of the results), read-only
    (None), or where the folder would lie below a file. Output: how many were refused, faults."""
    disk, refused, faults = WORK / "disk", 0, []
    need = sum(path.stat().st_size for path in (WORK / name / "whole").glob("**/*"))
    cases = [(kind, room) for kind in ("new", "begun") for room in (0, 0.1, 0.4, None)]
    for kind, room in [*cases, ("below a file", 1)]:
        if not mount("-t", "tmpfs", "-o", f"size={4 * need + 2**22}", "tmpfs", disk):
            return refused, [*faults, "full disk, read-only folder: not tried, mount is refused"]
        if kind == "begun":
            shutil.copytree(WORK / name / "begun", disk, dirs_exist_ok=True)
        saved, full = progress(disk), disk / "full"
        full.write_bytes(bytes(shutil.disk_usage(disk).free - int((room or 0) * need)))
        if room is None:
            mount("-o", "remount,ro", disk)
        directory = "full/run" if kind == "below a file" else "run"
        status = watch(start(name, world, disk, directory), disk)
        refused, found = refused + bool(status), unclear(name, status) if status else []
        mount("-o", "remount,rw", disk)
        full.unlink(missing_ok=True)
        if temporaries(disk) and room is not None or progress(disk) < saved:
            found.append(f"{saved} saved, then {progress(disk)}, and {temporaries(disk)}")
        found += unequal(name, watch(start(name, world, disk), disk), disk)
        faults += [f"{kind}, room {room}: {fault}" for fault in found]
        subprocess.run(["umount", "-l", disk], check=True)
    return refused, faults


def mount(*arguments):
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


def main():
    warnings.simplefilter("ignore")  # of the libraries
    torch.set_num_threads(1)  # after threaded work in the parent a child would hang
    transformers.utils.logging.disable_progress_bar()
    (WORK / "disk").mkdir()
    world = {"work": WORK, "wavs": make_twins.wav_files(WORK / "wavs", n=24)}
    world["calls"] = make_twins.wav_files(WORK / "calls", n=10, rate=8000)
    rows = [test_duplex.dialogue(WORK, f"d{n}") for n in range(6)]
    world["dialogues"] = test_duplex.write(WORK / "dialogues.jsonl", rows)
    for kind in ("whisper", "qwen3", "official", "mimi"):
        world[kind] = getattr(make_twins, f"{kind}_folder")(WORK / kind)
    wrong = 0
    for name in JOBS:
        began, whole, begun = time.monotonic(), WORK / name / "whole", WORK / name / "begun"
        status = watch(start(name, world, whole), whole)
        seconds = time.monotonic() - began
        if status:
            sys.exit(f"{name}, undisturbed: status {status}, {said(name)}; see {WORK}")
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        kills, in_save, runs, faults = kill_often(name, world, seconds)
        moment = 0.5 * seconds
        while not progress(begun):
            watch(start(name, world, begun), begun, moment := 1.2 * moment)
        for path in begun.glob("run/*.jsonl"):
            path.write_bytes(path.read_bytes() + '{"cut within ä'.encode()[:-1])  # as a kill may
        refused, more = starve(name, world)
        faults += more
        print(f"{name:16s} killed {kills} times, {in_save} in a save, {runs} runs ended; full disk "
              f"or read-only: {refused} of 9 refused; {len(faults) or 'no'} faults; "
              f"{time.monotonic() - began:.0f} s", *faults, sep="\n    ", flush=True)  # fmt: skip
        wrong += len(faults)
    if wrong:
        sys.exit(f"{wrong} faults; see {WORK}")
    shutil.rmtree(WORK)


if __name__ == "__main__":
    main()
