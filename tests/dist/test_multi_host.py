"""A whole run on two hosts, started as on a cluster, equals the same run on one.

Needs root, network namespaces, and `apt-get install iproute2 openssh-server pdsh`; says what is missing.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.dist.pool import free_port
from tests.dist.run_inputs import losses, tiny_recipe, zero_share
from tests.dist.test_run import LONG, run_recipe
from tests.dist.two_hosts import INTERFACE, NAMES, TwoHosts, clean_environment, two_hosts, why_not

ROOT = Path(__file__).parents[2]
PER_HOST = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": INTERFACE}
QUICK: dict[str, Any] = {"training__save_strategy": "no", "export": {"delta": "masked", "check": False}}
QUICK["training__ddp_timeout"] = 100  # if one host does not come up, the other one says so soon
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def one_host(inputs, pools, tmp_path_factory):
    """The same recipe on two ranks of this machine."""
    output = tmp_path_factory.mktemp("one") / "run"
    pools(2).run(run_recipe, tiny_recipe(inputs, output, **QUICK), timeout=LONG)
    return output


def start_with_pdsh(hosts: TwoHosts, words: list[str], folder: Path) -> list[subprocess.Popen[bytes]]:
    """One launch, on the first host."""
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    # Without the cache of compiled operators each host would build them anew, for a minute or more.
    cache = {"TORCH_EXTENSIONS_DIR": os.environ["TORCH_EXTENSIONS_DIR"], "PATH": hosts.path}
    variables = PER_HOST | cache
    (folder / ".deepspeed_env").write_text("".join(f"{key}={value}\n" for key, value in variables.items()))
    env = {"PATH": hosts.path, "HOSTFILE": str(folder / "hostfile"), "MASTER_PORT": str(free_port())}
    command = [str(ROOT / "launch/multi_node_pdsh.sh"), *words]
    return [hosts.start(0, command, folder / "log", cwd=folder, env=clean_environment(env))]


def start_with_accelerate(
    hosts: TwoHosts, words: list[str], folder: Path, machines: int = 2
) -> list[subprocess.Popen[bytes]]:
    """The same command on each host; the DeepSpeed config comes with accelerate's file."""
    config = yaml.safe_load((ROOT / "ds_configs/accelerate_multi_node.yaml").read_text())
    recipe = yaml.safe_load(Path(words[1]).read_text())
    (folder / "deepspeed.json").write_text(json.dumps(recipe["training"]["deepspeed"]))
    config["deepspeed_config"]["deepspeed_config_file"] = str(folder / "deepspeed.json")
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    env = {
        "PATH": hosts.path,
        "NUM_MACHINES": str(machines),
        "NUM_PROCESSES": "1",
        "MASTER_ADDR": hosts.addresses[0],
    }
    env |= {"MASTER_PORT": str(free_port()), "ACCELERATE_CONFIG": str(folder / "accelerate.yaml"), **PER_HOST}
    command = [str(ROOT / "launch/accelerate_each_node.sh"), *words, "--deepspeed", "null"]
    started = []
    for host in range(machines):
        own = clean_environment({**env, "MACHINE_RANK": str(host)})
        started.append(hosts.start(host, command, folder / f"log{host}", cwd=folder, env=own))
    return started


def wait_for(started: list[subprocess.Popen[bytes]], folder: Path, seconds: float) -> None:
    """Wait until all have ended well; the first that did not is shown with the logs."""
    deadline = time.monotonic() + seconds
    while any(process.poll() is None for process in started) and time.monotonic() < deadline:
        if any(process.poll() not in (None, 0) for process in started):
            break
        time.sleep(0.2)
    codes = [process.poll() for process in started]
    if codes != [0] * len(started):
        logs = "\n".join(path.read_text()[-6000:] for path in sorted(folder.glob("log*")))
        pytest.fail(f"exit codes {codes} (None: did not end in {seconds:.0f} s)\n{logs}")


@pytest.mark.parametrize("start", [start_with_pdsh, start_with_accelerate])
def test_two_hosts_train_prune_save_and_export_what_one_host_does(hosts, inputs, one_host, tmp_path, start):
    output = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(inputs, output, **QUICK)))
    words = [str(ROOT / "launch/finetune.py"), str(tmp_path / "recipe.yaml")]
    wait_for(start(hosts, words, tmp_path), tmp_path, seconds=250)
    if start is start_with_pdsh:  # which names the host in front of each line that came from there
        said = (tmp_path / "log").read_text()
        assert all(re.search(rf"^{name}: .*node_rank={rank}", said, re.M) for rank, name in enumerate(NAMES))
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["run"]["world_size"] == 2
    assert losses(output) == losses(one_host)
    assert zero_share(output / "model") == zero_share(one_host / "model")
    for pattern in ("adapter/*.safetensors", "model/*.safetensors"):
        expected = sorted(path.relative_to(one_host) for path in one_host.glob(pattern))
        assert expected == sorted(path.relative_to(output) for path in output.glob(pattern)) and expected
        for name in expected:
            ours, theirs = load_file(output / name), load_file(one_host / name)
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours), name


def test_a_host_that_is_cut_off_is_noticed_on_both_and_the_one_that_is_left_goes_on(hosts, inputs, tmp_path):
    output = tmp_path / "run"
    quick = {
        **QUICK,
        "training__save_strategy": "steps",
        "training__save_steps": 2,
        "training__max_steps": 60,
    }
    recipe = tiny_recipe(inputs, output, **{**quick, "training__ddp_timeout": 20})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = [str(ROOT / "launch/finetune.py"), str(tmp_path / "recipe.yaml")]
    started = start_with_accelerate(hosts, words, tmp_path)
    reached = output / "checkpoint-4"
    while not reached.is_dir() and all(process.poll() is None for process in started):
        time.sleep(0.02)
    hosts.set_link("down")
    try:
        codes = [process.wait(timeout=120) for process in started]
    finally:
        hosts.set_link("up")
    said = [(tmp_path / f"log{host}").read_text() for host in (0, 1)]
    assert all(codes), said
    for rank in (0, 1):
        assert f"rank {rank} lost another rank during 'tune" in said[rank], said[rank][-5000:]
    # One process takes the two micro-batches of a step one after the other.
    words += ["--resume", "--gradient_accumulation_steps", "2"]
    wait_for(start_with_accelerate(hosts, words, tmp_path, machines=1), tmp_path, seconds=250)
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["run"]["world_size"] == 1
    assert list(losses(output)) == list(range(1, 66))
    zeros, total = zero_share(output / "model")
    assert zeros == total // 2
