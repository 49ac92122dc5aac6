"""Repeated helpers are the same to the byte, configs load, every key is read, every script stands alone."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ["precompute", "train_phase1", "train_phase2", "infer", "train_steermoe", "finetune_encoder"]
FINETUNE = ["fun_asr_nano", "stage1", "telephone_8k", "telephone_8k_from_hub", "telephone"]  # finetune_encoder.py's


def script_of(config):
    """The module that reads configs/CONFIG.yaml or configs/demo_CONFIG.yaml."""
    name = "finetune_encoder" if config in FINETUNE else config
    return importlib.import_module(name if name in SCRIPTS else f"train_{name}")


def section(script, title):
    """Text from the ruler with this title to the next ruler."""
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    start = text.index(f"# ---- {title}")
    return text[start : text.index("\n# ---- ", start + 1)].rstrip()


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_configuration_section_is_the_same_in_every_script(script):
    assert section(script, "configuration") == section("precompute", "configuration")


@pytest.mark.parametrize("title", ["data: the cache", "bookkeeping of a training run"])
def test_training_helpers_are_the_same_in_both_phases(title):
    assert section("train_phase1", title) == section("train_phase2", title)


def function(script, name):
    """Source of a top-level function."""
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    node, = (n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == name)
    return ast.get_source_segment(text, node)


@pytest.mark.parametrize("script, names", [
    ("train_steermoe", "cut_batches epoch_batches learning_rate trim_metrics log_metrics"),
    ("finetune_encoder", "cut_batches all_bad write_bad trim_metrics log_metrics"),
])
def test_these_functions_are_the_same_as_in_phase_2(script, names):
    """These scripts have other keys and other files than the two phases, so whole sections do not fit them."""
    assert [function(script, name) for name in names.split()] == [function("train_phase2", n) for n in names.split()]


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "steermoe").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_steermoe_config_loads(path):
    script = importlib.import_module("train_steermoe")
    config = script.load_config(script.split_arguments([str(path)]), script.DEFAULTS)
    assert set(config) == set(script.DEFAULTS)
    assert (config["steering.num_experts"] == 0) == path.stem.startswith("linear")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    script = script_of(path.stem.removeprefix("demo_"))
    config = script.load_config([str(path)], script.DEFAULTS)
    assert set(config) == set(script.DEFAULTS)


@pytest.mark.parametrize("name", ["precompute", "phase1", "phase2", "infer"])
def test_the_full_configs_write_out_every_key(name):
    script = importlib.import_module(name if name in SCRIPTS else f"train_{name}")
    text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    absent = [key for key in script.DEFAULTS if not re.search(rf"\b{re.escape(key.split('.')[-1])}:", text)]
    assert absent in ([], ["inputs"])


@pytest.mark.parametrize("script", SCRIPTS[:-1])  # finetune_encoder.py has a test of its own: test_finetune.py
def test_every_key_is_read(script):
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    body = text[text.index("\n}\n", text.index("DEFAULTS = {")) :]
    per_part = {f"data.{part}" for part in ("train", "valid", "test")} if 'cfg[f"data.{part}"]' in body else set()
    if 'cfg[f"{kind}.model_path"]' in body and "cfg[f'{kind}.{key}']" in body:  # whisper_encoder or conformer_encoder
        per_part |= {f"{kind}_encoder.{key}" for kind in ("whisper", "conformer")
                     for key in ("model_path", "feature_dim", "num_layers")}
    unread = [key for key in importlib.import_module(script).DEFAULTS if f'"{key}"' not in body and key not in per_part]
    assert unread == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_runs_when_copied_alone_with_model_py(script, tmp_path):
    for name in (script, "model"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    run = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for key in importlib.import_module(script).DEFAULTS:
        assert key in run.stdout


def test_nothing_is_fetched_with_remote_code_or_unpickled():
    for path in ROOT.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            assert "trust_remote_code" not in keywords, path
            if isinstance(call.func, ast.Attribute) and ast.unparse(call.func) == "torch.load":
                assert ast.unparse(keywords["weights_only"]) == "True", f"{path}:{call.lineno}"


def test_every_command_of_the_readme_names_files_and_keys_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^(?:\| `)?(?:torchrun \S+ \S+ |python )((?:\w+)\.py)([^\n#`]*)", readme, re.MULTILINE)
    assert len(commands) >= 6
    for script, rest in commands:
        assert (ROOT / script).is_file(), script
        module = importlib.import_module(script.removesuffix(".py"))
        if script == "bench.py":
            assert set(module.parse(rest.split()).stages) <= set(module.BUILD)  # exits where an option is unknown
            continue
        defaults = module.DEFAULTS
        for word in rest.split():
            if word.endswith(".yaml"):
                assert (ROOT / word).is_file(), word
            elif "=" in word:
                assert word.split("=")[0] in defaults, f"{script} {word}"
