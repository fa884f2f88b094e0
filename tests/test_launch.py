"""The recipes in launch/: they parse, and their commands start one process for each place, with its
place.
"""

import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from builders import ROOT

LAUNCH = ROOT / "launch"


def program(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    return str(path)


def jobset() -> dict:
    """The container of the set's one job."""
    recipe = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert recipe["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert recipe["kind"] == "JobSet"
    [job] = recipe["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == 2
    assert spec["completions"] == 2
    [container] = spec["template"]["spec"]["containers"]
    values = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(values["PROCESSES"]) == spec["completions"]
    # The stable name of the first pod: set, job, its number, the pod's index; behind the set's own
    # subdomain.
    place = f"{recipe['metadata']['name']}-{job['name']}-0-0.{recipe['metadata']['name']}:"
    assert values["COORDINATOR"] == f"{place}{container['ports'][0]['containerPort']}"
    return container | {"values": values}


def skypilot() -> dict:
    recipe = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    keys = {"name", "num_nodes", "resources", "envs", "file_mounts", "workdir", "setup", "run"}
    assert recipe.keys() <= keys
    assert set(recipe["file_mounts"]) == {"/" + recipe["envs"]["RUN"].split("/")[1]}
    return recipe


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_pod.sh"])
def test_scripts_parse(script):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("recipe", ["slurm", "jobset", "skypilot", "tpu_pod"])
def test_what_a_recipe_starts(recipe, resumed, tmp_path):
    """Run twice, the second time with the run's manifest there: then with --resume."""
    folder = tmp_path / "run"
    if resumed:
        folder.mkdir()
        (folder / "manifest.json").touch()
    shown = program(tmp_path / "rlhf-jax", 'printf "%s\\n" "$*"')
    program(tmp_path / "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    program(tmp_path / "gcloud", 'for last; do :; done; exec bash -c "$last"')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": str(folder)}
    environment["RLHF_JAX"] = shown
    place = "auto"
    if recipe == "jobset":
        container = jobset()
        command = [*container["command"], *container["args"]]
        environment = container["values"] | environment | {"JOB_COMPLETION_INDEX": "1"}
        place = f"{container['values']['COORDINATOR']},2,1"
    elif recipe == "skypilot":
        command = ["bash", "-c", skypilot()["run"]]
        nodes = "10.0.0.7\n10.0.0.8"
        environment |= skypilot()["envs"] | {"RUN": str(folder), "SKYPILOT_NODE_IPS": nodes}
        environment |= {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
        place = "10.0.0.7:9876,2,1"
    else:
        command = ["bash", LAUNCH / f"{recipe}.sh", "ppo", "--config", "my.yaml"]
        environment |= {"TPU": "pod", "ZONE": "a"}
    said = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    ).stdout
    words = shlex.split(said)
    assert words[:1] == ["ppo"]
    assert words[words.index("--output-dir") + 1] == str(folder)
    assert words[words.index("--processes") + 1] == place
    assert ("--resume" in words) == resumed


@pytest.mark.slow
def test_the_command_of_the_set_trains_with_two_processes(tmp_path):
    container = jobset()
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{server.getsockname()[1]}"
    environment = (
        os.environ
        | container["values"]
        | {"COORDINATOR": coordinator, "RUN": str(tmp_path / "run")}
    )
    environment |= {
        "RLHF_JAX": program(tmp_path / "rlhf-jax", f'exec {sys.executable} -m rlhf_jax "$@"')
    }
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    flags = ["sft", "--config", "tiny", "--sft.max-steps", "1"]
    command = [*container["command"], *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    places = [environment | {"JOB_COMPLETION_INDEX": str(number)} for number in range(2)]
    running = [subprocess.Popen(command, env=place, **pipes) for place in places]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert (tmp_path / "run" / "model" / "config.json").is_file()
