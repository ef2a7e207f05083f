"""launch/ and ds_configs/: scripts hand everything on, files parse and point at files that exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
YAML_FILES = sorted((ROOT / "ds_configs").glob("*.yaml"))
JSON_FILES = sorted((ROOT / "ds_configs").glob("*.json"))
WORDS = ["launch/finetune.py", "recipes/a b.yaml", "--prompt", 'say "hi" to $HOME', "--deepspeed", "null"]
LAUNCHERS = ("deepspeed", "accelerate", "torchrun", "srun")
NEEDED = {
    "accelerate_each_node.sh": {"MACHINE_RANK": "1", "NUM_MACHINES": "4", "MASTER_ADDR": "10.0.0.1"},
    "multi_node_pdsh.sh": {},
    "single_node.sh": {},
    "slurm.sh": {"SLURM_JOB_NODELIST": "a[1-4]", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_ID": "77"},
    "torchrun.sh": {},
}


@pytest.fixture
def recorded(tmp_path):
    """Run a script with every launcher replaced by one that writes its words down."""
    folder = tmp_path / "bin"
    folder.mkdir()
    recorder = f"#!{sys.executable}\nimport json, os, sys\n"
    recorder += "json.dump([os.path.basename(sys.argv[0]), *sys.argv[1:]], open(os.environ['RECORD'], 'w'))\n"
    recorder += "json.dump(dict(os.environ), open(os.environ['RECORD'] + '.env', 'w'))\n"
    recorder += "print(4711 if '-c' in sys.argv else '')\n"
    for name in LAUNCHERS:
        (folder / name).write_text(recorder)
    (folder / "scontrol").write_text("#!/bin/sh\nprintf 'a1\\na2\\na3\\na4\\n'\n")
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for path in folder.iterdir():
        path.chmod(0o755)
    (tmp_path / "hosts").write_text("a1 slots=3\na2 slots=3\n")

    def run(script: str, words: list[str] = WORDS, **environment: str) -> list[str]:
        env = {"PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        env |= {"RECORD": str(tmp_path / "words.json"), "HOSTFILE": str(tmp_path / "hosts")}
        env |= {"NUM_PROCESSES": "3", **NEEDED[script], **environment}
        done = subprocess.run(
            [ROOT / "launch" / script, *words], env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        found = json.loads((tmp_path / "words.json").read_text())
        assert f"+ '{found[0]}'" in done.stderr, "the command is not printed"
        return found

    return run


def after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


def test_every_script_is_known():
    assert [path.name for path in SCRIPTS] == sorted(NEEDED)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_short_strict_and_executable(script):
    text = script.read_text()
    assert len(text.splitlines()) <= 30
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert '"$@"' in text
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize("script", sorted(NEEDED.keys() - {"multi_node_pdsh.sh"}))
def test_script_hands_every_word_on_unchanged(recorded, script):
    assert recorded(script)[-len(WORDS) :] == WORDS


@pytest.mark.parametrize("module", [[], ["--module"]])
def test_every_word_arrives_unchanged_behind_pdsh_and_the_other_machines_shell(recorded, module):
    """DeepSpeed makes one line of them, in which it quotes words with blanks alone; pdsh fills in %h, %u and %n."""
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import parse_args

    hard = [
        r".*\.(q|v)_proj",
        "[k_proj,v_proj]",
        "{a: 1}",
        "it's",
        "100%n",
        "grün & blau; *",
        "",
        "a\nb",
        "-x=1 2",
    ]
    given = [*module, *WORDS, *hard]
    args = parse_args(recorded("multi_node_pdsh.sh", given)[1:])
    assert (args.launcher, args.force_multi, args.module) == ("pdsh", True, bool(module))
    line = " ".join([args.user_script, *PDSHRunner(args, "").user_arguments])
    assert "%" not in line and args.user_script == WORDS[0]
    show = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
    for shell in ("bash", "zsh"):
        if shutil.which(shell):
            said = subprocess.run([shell, "-c", f"{shlex.join(show)} {line}"], capture_output=True, text=True)
            assert json.loads(said.stdout) == [*WORDS, *hard], said.stderr


@pytest.mark.parametrize("script", ["single_node.sh", "multi_node_pdsh.sh", "torchrun.sh"])
def test_script_finds_a_port_that_is_free_and_takes_a_given_one(recorded, script):
    port = int(after(recorded(script), "--master_port"))
    with socket.socket() as probe:
        probe.bind(("", port))
    assert after(recorded(script, MASTER_PORT="4242"), "--master_port") == "4242"


def test_scripts_start_the_asked_number_of_processes(recorded):
    assert after(recorded("single_node.sh"), "--num_gpus") == "3"
    assert after(recorded("torchrun.sh"), "--nproc_per_node") == "3"
    assert after(recorded("accelerate_each_node.sh"), "--num_processes") == "12"
    assert after(recorded("slurm.sh"), "--nproc_per_node") == "3"


@pytest.mark.parametrize("visible", ["GPU-8f1e,GPU-9a3c", "MIG-4b"])
def test_gpus_by_uuid_which_deepspeeds_launcher_cannot_read_are_refused_with_the_way_out(tmp_path, visible):
    (tmp_path / "python").write_text("#!/bin/sh\necho 2\n")
    (tmp_path / "deepspeed").write_text("#!/bin/sh\necho started\n")
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": visible}
    command = [ROOT / "launch" / "single_node.sh", "x.py"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "started" not in done.stdout and "launch/torchrun.sh" in done.stderr
    done = subprocess.run(command, env={**env, "CUDA_VISIBLE_DEVICES": "3,1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "'localhost:3,1'" in done.stderr


def test_more_processes_than_gpus_are_visible_are_refused(tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho 2\n")
    (tmp_path / "python").chmod(0o755)
    for visible in ({}, {"CUDA_VISIBLE_DEVICES": "0,1"}):
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NUM_PROCESSES": "4", **visible}
        command = [ROOT / "launch" / "single_node.sh", "x.py"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr == "NUM_PROCESSES is 4, but 2 GPUs are visible\n"


def test_a_folder_that_the_other_machines_shell_would_cut_is_refused(tmp_path):
    """DeepSpeed's line for pdsh begins with `cd` and this folder, unquoted."""
    hosts, folder = tmp_path / "hosts", tmp_path / "my run"
    hosts.write_text("a1 slots=3\n")
    folder.mkdir()
    env = {"PATH": os.environ["PATH"], "HOSTFILE": str(hosts)}
    command = [ROOT / "launch" / "multi_node_pdsh.sh", "x.py"]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and f"found {folder}: start from another folder" in done.stderr


def test_slurm_hands_the_cores_of_a_task_on_to_srun(recorded, tmp_path):
    recorded("slurm.sh", SLURM_CPUS_PER_TASK="12")
    assert json.loads((tmp_path / "words.json.env").read_text())["SRUN_CPUS_PER_TASK"] == "12"
    recorded("slurm.sh")
    assert "SRUN_CPUS_PER_TASK" not in json.loads((tmp_path / "words.json.env").read_text())


def test_torchrun_on_several_machines_names_the_first_one(recorded):
    words = recorded("torchrun.sh", NNODES="4", NODE_RANK="2", MASTER_ADDR="10.0.0.1")
    assert [after(words, flag) for flag in ("--nnodes", "--node_rank")] == ["4", "2"]
    assert [after(words, flag) for flag in ("--master_addr", "--master_port")] == ["10.0.0.1", "29500"]


def test_slurm_meets_at_a_port_of_the_first_machine(recorded):
    words = recorded("slurm.sh")
    assert after(words, "--rdzv_endpoint") == "a1:4711"
    assert [after(words, flag) for flag in ("--nnodes", "--rdzv_id")] == ["4", "77"]


def test_slurm_gives_ranks_the_time_that_it_warns_them_ahead_and_whole_machines(recorded, tmp_path):
    """torchrun kills them 30 s after it passed SIGTERM on, and Slurm gives a task one core, if not told otherwise."""
    recorded("slurm.sh")
    asked = re.findall(r"^#SBATCH --(\S+)", (ROOT / "launch" / "slurm.sh").read_text(), re.M)
    ahead = next(int(words.partition("@")[2]) for words in asked if words.startswith("signal="))
    given = int(json.loads((tmp_path / "words.json.env").read_text())["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert ahead - 20 < given < ahead and {"exclusive", "mem=0"} <= set(asked)


@pytest.mark.parametrize(
    ("script", "missing"),
    [("accelerate_each_node.sh", "MACHINE_RANK"), ("accelerate_each_node.sh", "MASTER_ADDR")],
)
def test_a_missing_setting_is_named(script, missing):
    env = {"PATH": os.environ["PATH"], **NEEDED[script]}
    del env[missing]
    done = subprocess.run([ROOT / "launch" / script], env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert missing in done.stderr


def test_a_missing_hostfile_is_named(tmp_path):
    env = {"PATH": os.environ["PATH"], "HOSTFILE": str(tmp_path / "none")}
    done = subprocess.run([ROOT / "launch" / "multi_node_pdsh.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{tmp_path / 'none'} does not exist" in done.stderr


def test_the_example_hostfile_is_one_for_deepspeed():
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(ROOT / "launch" / "hostfile.example"))) == {"worker-0": 8, "worker-1": 8}


def test_every_accelerate_file_is_known():
    assert [path.stem.removeprefix("accelerate_") for path in YAML_FILES] == [
        "cpu",
        "multi_node",
        "multi_node_pdsh",
        "single_node",
    ]


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_accelerate_takes_the_file_and_finds_its_deepspeed_config(path, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    monkeypatch.chdir(ROOT)
    config = load_config_from_file(str(path))
    assert config.distributed_type == "DEEPSPEED"
    assert config.num_processes % config.num_machines == 0
    # Of accelerate's DeepSpeed settings only these may stand beside a DeepSpeed file, or it raises.
    beside = {
        "deepspeed_config_file",
        "zero3_init_flag",
        "deepspeed_multinode_launcher",
        "deepspeed_hostfile",
    }
    assert set(config.deepspeed_config) <= beside
    words = ["--config_file", str(path), "--main_process_port", "0", *WORDS]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert args.use_deepspeed
    args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    command, environment = prepare_deepspeed_cmd_env(args)
    for key, value in environment.items():
        if key.startswith("ACCELERATE_"):
            monkeypatch.setenv(key, value)
    plugin = DeepSpeedPlugin()  # raises where the file says what the DeepSpeed config is there to say
    named = ROOT / config.deepspeed_config["deepspeed_config_file"]
    given = json.loads(named.read_text())
    assert plugin.zero_stage == given["zero_optimization"]["stage"]
    assert plugin.deepspeed_config["zero_optimization"] == given["zero_optimization"]
    if "pdsh" in path.name:
        assert command[:3] == ["deepspeed", "--hostfile", "launch/hostfile"]
        assert command[-len(WORDS) :] == WORDS
    else:
        assert command is None


def test_readmes_name_every_file():
    table = (ROOT / "ds_configs" / "README.md").read_text()
    assert {path.name for path in JSON_FILES + YAML_FILES} <= set(re.findall(r"`([\w.]+)`", table))
    guide = (ROOT / "launch" / "README.md").read_text()
    names = {path.name for path in SCRIPTS} | {"finetune.py", "hostfile.example"}
    assert names <= set(re.findall(r"`(?:launch/)?([\w.]+)`", guide))


@pytest.mark.parametrize(
    ("target", "failing"),
    [("bench", "benchmarks/calibration.py"), ("test", "tests/unit"), ("test", "tests/dist")],
)
def test_make_fails_when_any_part_does(tmp_path, target, failing):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    (tmp_path / ".ready").touch()

    def make(word: str) -> int:
        python.write_text(f'#!/bin/sh\ncase "$*" in *"{word}"*) exit 1;; esac\n')
        python.chmod(0o755)
        command = ["make", "--quiet", target, f"VENV={tmp_path}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True).returncode

    assert make("no such word") == 0 and make(failing) != 0


def test_ci_says_in_its_last_line_whether_two_hosts_could_be_tested(tmp_path):
    """Also where a step fails, and where the install of their tools does."""
    for name, code in {"make": "test $1 != test", "apt-get": "exit 1", "id": "echo 0"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(ROOT / ".ci" / "run")], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "THE INSTALL FAILED" in done.stdout.splitlines()[-1]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck():
    subprocess.run(["shellcheck", "--severity=warning", *SCRIPTS], check=True)
