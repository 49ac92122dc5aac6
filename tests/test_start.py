"""Starting a script: configuration, errors, files that survive a kill, runs, frozen modules."""

import copy
import json
import multiprocessing
import pickle
import resource
import socket
import sys
import time

import pytest
import torch
from omegaconf import ListConfig, OmegaConf
from torch import nn

import model

DEFAULTS = """
data:
  train: ???
  valid: ""
  speed: [1.0]
  names: []
optim: {lr: 1e-3, epochs: 2}
run: {dir: r, resume: false, note: null}
llm:
  prompt: "Transcribe:"
  lora: {r: 0, alpha: 16}
seed: 0
"""


def load(*arguments, **spelling):
    return model.load_config(["data.train=t", *arguments], DEFAULTS, **spelling)


@pytest.fixture
def written(tmp_path):
    def write(text, encoding="utf-8"):
        (tmp_path / "c.yaml").write_text(text, encoding=encoding)
        return str(tmp_path / "c.yaml")

    return write


def test_files_and_arguments_share_one_spelling_and_the_later_wins(written):
    file = written("data: {train: a.jsonl}\noptim: {lr: 3e-4, epochs: 7}\nllm.lora.r: 4\n")
    for arguments in ([file], ["--config", file], [f"--config={file}"]):
        cfg = model.load_config([*arguments, "++optim.epochs=9", "data.speed=0.9,1.0"], DEFAULTS)
        assert (cfg.data.train, cfg.optim.lr, cfg.optim.epochs) == ("a.jsonl", 3e-4, 9)
        assert cfg.data.speed == [0.9, 1.0] and cfg.llm.lora == {"r": 4, "alpha": 16}
    assert model.load_config(["optim.epochs=9", file], DEFAULTS).optim.epochs == 7


SPELLING = {"aliases": {"fp16": "run.resume"}, "optional": ("llm.lora",)}


@pytest.mark.parametrize(("key", "typed", "value"), [
    ("data.names", "[0571, No]", ["0571", "No"]), ("data.names", "", []),
    ("llm.prompt", "a: b # c, [d]", "a: b # c, [d]"), ("run.dir", "007", "007"),
    ("llm.prompt", "x" * 500, "x" * 500),  # longer than a file's name may be
    ("run.dir", "1e-4", "1e-4"), ("run.dir", "No", "No"), ("run.dir", "runs/${seed}", "runs/0"),
    ("optim.epochs", "${seed}", 0), ("run.note", "", ""), ("run.note", "null", None),
    ("run.resume", "Yes", True), ("optim.lr", "1e-4", 1e-4),
])  # fmt: skip
def test_a_value_stays_as_typed_or_gets_its_defaults_type(written, key, typed, value):
    quoted = typed if key == "data.names" and typed else json.dumps(typed)
    for argument in (f"{key}={typed}", written(f"{key}: {quoted}\n")):
        found = OmegaConf.select(load(argument), key)
        assert found == value and type(found) in (type(value), ListConfig)


@pytest.mark.parametrize(("text", "key", "value"), [
    ("run: {note: }\n", "run.note", None), ("run:\n  note:\n", "run.note", None),
    ("data: {train: [a, b]}\n", "data.train", ["a", "b"]),
    ("fp16: true\n", "run.resume", True), ("llm: {lora: null}\n", "llm.lora", None),
    ("llm: {lora: null}\nllm.lora.r: 2\n", "llm.lora", {"r": 2, "alpha": 16}),
])  # fmt: skip
def test_empty_values_aliases_and_sections_that_can_be_off(written, text, key, value):
    assert OmegaConf.select(load(written(text), **SPELLING), key) == value


@pytest.mark.parametrize(("text", "message"), [
    ("optim: {lrr: 1}\n", "c.yaml: unknown key 'optim.lrr'; did you mean 'optim.lr'"),
    ("optim.epochs: many\n", "c.yaml: optim.epochs: expected int, got 'many'"),
    ("optim.epochs: 2.5\n", "expected int, got '2.5'"),
    ("optim.epochs: null\n", "expected int, got 'null'"),
    ("run.resume: 1\n", "run.resume: expected bool, got '1'"),
    ("data.speed: [1.0, fast]\n", "data.speed: expected float, got 'fast'"),
    ("seed: 1\nseed: 2\n", "c.yaml: 'seed' is given twice.*line 1"),
    ("optim: {lr: 1, lr: 2}\n", "c.yaml: 'lr' is given twice.*line 1"),
    ("optim: {lr: 1}\noptim.lr: 2\n", "c.yaml: optim.lr is given twice"),
    ("optim.lr: 2\noptim: {lr: 1}\n", "c.yaml: optim.lr is given twice"),
    ("optim: 3\n", "unknown key 'optim'"), ("- a\n", "c.yaml: expected `key: value`"),
    ("a: [\n", "c.yaml: .*line"), ("run.dir: ${nothing}\n", "configuration: .*nothing"),
    ("llm.prompt: a ${b\n", "configuration: "),
])  # fmt: skip
def test_a_wrong_configuration_is_refused_by_name(written, text, message):
    with pytest.raises(model.UserError, match=message):
        load(written(text))


def test_wrong_arguments_and_values_are_refused_by_name(written):
    for argument, message in (
        ("sead=1", "argument sead=1: unknown key 'sead'; .*'seed'"),
        ("nowhere.yaml", "nowhere.yaml: .*No such file"),
        (written("run.dir: naïve\n", "latin-1"), "c.yaml: .*utf-8"),
        ("llm.lora=null", "unknown key 'llm.lora'"),  # no section that can be off
        ("data.train=", "required key not given: data.train"),
        ("data.train=null", "required key not given: data.train"),
    ):
        with pytest.raises(model.UserError, match=message):
            load(argument)
    cfg = load("optim.epochs=0")
    model.at_least(0, cfg, "optim.epochs", "seed")
    model.one_of(("q", "r"), cfg, "run.dir")
    with pytest.raises(model.UserError, match="^optim.epochs: has to be at least 1, got 0"):
        model.at_least(1, cfg, "llm.lora.alpha", "optim.epochs")
    with pytest.raises(model.UserError, match="^run.dir: expected one of y, z; got 'r'"):
        model.one_of(("y", "z"), cfg, "run.dir")
    steps = [[step for step in range(1, 8) if model.due(step, every, 7)] for every in (0, 3)]
    assert steps == [[7], [3, 6, 7]]


def run(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["script.py", "data.train=t", *arguments])
    model.run_main(main, DEFAULTS, "What it does.", "batch_s")


@pytest.mark.parametrize(("error", "said"), [
    (model.UserError("a.wav: broken"), "error: a.wav: broken\n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB. GPU 0"), "lower batch_s"),
])  # fmt: skip
def test_a_users_mistake_is_one_line_and_exit_status_2(monkeypatch, capsys, error, said):
    def main(cfg):
        raise error

    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and said in err and err.count("\n") == 1 and not out


def test_a_bug_keeps_its_traceback_and_help_shows_all(monkeypatch, capsys):
    with pytest.raises(ValueError, match="invalid literal"):
        run(monkeypatch, lambda cfg: int(cfg.llm.prompt))
    run(monkeypatch, None, "--help")
    assert "What it does." in (said := capsys.readouterr().out) and "epochs: 2" in said


def test_devices_and_types_that_are_not_there_are_refused():
    assert model.start() == model.start("cpu", "fp32") or torch.cuda.is_available()
    assert model.start("cpu", "bf16") == (torch.device("cpu"), torch.bfloat16, 0, 1)
    for device, dtype, message in (("gpu", "auto", "device: expected"), ("cpu", "fp8", "dtype: "),
                                   ("cuda", "auto", "torch sees no GPU")):  # fmt: skip
        if device != "cuda" or not torch.cuda.is_available():
            with pytest.raises(model.UserError, match=message):
                model.start(device, dtype)


FULL = "last.pt: not written .*(large|full).* is whole"


@pytest.mark.parametrize(("write", "error", "message"), [
    (lambda file: torch.save({"a": torch.zeros(10**6)}, file), model.UserError, FULL),
    (lambda file: file.write(b"0" * 10**6), model.UserError, FULL),
    (lambda file: int(file.write(b"half") * "a bug"), ValueError, "invalid literal"),
])  # fmt: skip
def test_a_full_disk_or_a_bug_leaves_the_old_file_whole(tmp_path, write, error, message):
    path, other = tmp_path / "last.pt", tmp_path / "last.pt.tmp1"
    path.write_bytes(b"whole"), other.write_bytes(b"of another writer")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # fails half way, as a full disk
    try:
        with pytest.raises(error, match=message):
            model.save_atomic(path, write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == b"whole" and set(tmp_path.iterdir()) == {path, other}


def test_what_is_saved_by_its_files_ending(tmp_path):
    rows = [{"text": "你好\u2028"}, {"n": 1}]
    for name, content in (("a.pt", {"x": torch.ones(2)}), ("a.json", rows[0]), ("a.jsonl", rows)):
        model.save(tmp_path / name, content)
    (tmp_path / "a.txt").write_text("old")
    with open(tmp_path / "a.txt") as reader:  # who has the old file open goes on reading it
        model.save(tmp_path / "a.txt", "plain\n")
        assert reader.read() == "old"
    assert torch.equal(model.read_weights(tmp_path / "a.pt")["x"], torch.ones(2))
    assert json.loads((tmp_path / "a.json").read_bytes()) == rows[0]
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == rows and lines[-1] == ""
    assert (tmp_path / "a.txt").read_bytes() == b"plain\n" and "你好" in lines[0]


class Code:
    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


def test_only_plain_state_dicts_are_read(tmp_path, capsys):
    path = tmp_path / "w.pt"
    with pytest.raises(model.UserError, match="w.pt: no such file"):
        model.read_weights(path)
    torch.save({"x": torch.zeros(500)}, path)
    whole = path.read_bytes()
    torn = [whole[:cut] for cut in range(0, len(whole), 97)]
    for content in (Code(), {"x": Code()}, [torch.zeros(1)], *torn, b"text\n" * 50):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(model.UserError, match="w.pt: not a plain state dict, not loaded"):
            model.read_weights(path)
    assert "ran" not in capsys.readouterr().out


def test_hashes_tell_names_shapes_types_and_single_bits_apart():
    one = torch.arange(6.0)
    bit = one.clone()
    bit.view(torch.int32)[3] ^= 1
    different = [{"a": one}, {"b": one}, {"a": one.view(2, 3)}, {"a": one.bfloat16()}, {"a": bit},
                 {"a": one.view(2, 3).T}, {"a": one.view(torch.int32)}, {}]  # fmt: skip
    assert len({model.hash_tensors(tensors) for tensors in different}) == len(different)
    both = {"a": one, "b": bit}
    assert model.hash_tensors(both) == model.hash_tensors(dict(reversed(both.items())))


def test_a_folder_has_one_writer_and_is_free_again_after_kill_9(tmp_path):
    context, folder = multiprocessing.get_context("fork"), tmp_path / "new" / "run"
    locked = context.Event()

    def hold():
        model.lock_folder(folder)
        (folder / "last.pt.tmp123").touch(), (folder / "my.tmpl").touch()
        locked.set()
        time.sleep(60)

    other = context.Process(target=hold, daemon=True)
    other.start()
    assert locked.wait(30)
    with pytest.raises(model.UserError, match=f"process {other.pid} of {socket.gethostname()}"):
        model.lock_folder(folder)
    other.kill()
    other.join()
    model.lock_folder(folder)  # what the killed process left half written goes
    assert {path.name for path in folder.iterdir()} == {"lock", "my.tmpl"}


IDENTITY = {"encoder": {"name": "a", "weights": "1"}, "adaptor": {"num_heads": 8}}


def open_run(folder, identity=IDENTITY, resume=False, world=1, *arguments):
    return model.open_run(folder, load(*arguments), identity, resume, 0, world)


def test_a_run_is_new_or_resumed_as_it_was(tmp_path, capsys):
    assert open_run(tmp_path) is None and open_run(tmp_path, resume=True) is None
    assert OmegaConf.load(tmp_path / "config.yaml").optim.epochs == 2
    state = {"format": model.FORMAT, "identity": IDENTITY, "world": 2, "step": 7}
    state |= {"weights": torch.ones(1), "config": OmegaConf.to_container(load())}
    model.save(tmp_path / "last.pt", state)
    with pytest.raises(model.UserError, match="holds a run; give another folder, or resume it"):
        open_run(tmp_path, world=2)
    renamed = IDENTITY | {"encoder": {"name": "moved", "weights": "1"}}
    assert open_run(tmp_path, renamed, True, 2, "optim.epochs=3")["step"] == 7
    assert "resuming at step 7; changed: optim.epochs: 2 -> 3\n" in capsys.readouterr().out
    with pytest.raises(model.UserError, match="last.pt: is of 2 processes, this run has 1"):
        open_run(tmp_path, resume=True)
    for other in ({"encoder": {"weights": "2"}}, {"adaptor": {"num_heads": 4}}):
        with pytest.raises(model.UserError, match="another .*(weights was 1|num_heads was 8), is"):
            open_run(tmp_path, IDENTITY | other, True, 2)
    model.save(tmp_path / "last.pt", state | {"format": 2})
    with pytest.raises(model.UserError, match="last.pt: made by an earlier layout"):
        open_run(tmp_path, resume=True)
    (tmp_path / "last.pt").unlink()
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(model.UserError, match="holds a run"):
        open_run(tmp_path)
    # what only one of them knows is no difference
    model.check_identity({"encoder": {"weights": "1"}}, {"llm": {"weights": "2"}}, "x")
    model.check_identity({"llm": {"weights": "2"}}, {"llm": {"weights": "2", "layers": 3}}, "x")


def test_frozen_is_eval_for_good_whatever_a_parent_does_and_so_are_its_copies():
    first = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    first.lora_dropout = nn.ModuleDict({"default": nn.Dropout(0.5)})
    assert model.freeze(model.freeze(first)) is first
    for inner in (first, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        parent = nn.ModuleList([inner, nn.Dropout(0.5)])
        for mode in (True, False):
            parent.train(mode)
            inner.train(mode)
            training = {name: part.training for name, part in inner.named_modules()}
            follows = {name: "lora_dropout" in name and mode for name in training}
            assert training == follows and parent[1].training is mode
        assert type(inner) is nn.Sequential and not inner[0].weight.requires_grad
        inner[0].weight.add_(inner is not first)  # a copy has weights of its own
    assert torch.equal(inner[0].weight, first[0].weight + 1)
