"""The manifest of docs/guide/kubernetes.yaml says what the command line and Kubernetes need."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from experiments.smaug.pretrain import get_config
from vlmae.cli.options import parse
from vlmae.parallel.exit_codes import PREEMPTED

PATH = Path(__file__).parents[2] / "docs" / "guide" / "kubernetes.yaml"
SERVICE, JOB = yaml.safe_load_all(PATH.read_text())
POD = JOB["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]


def test_every_pod_runs_a_command_that_is_accepted():
    script = CONTAINER["args"][0].replace("$JOB_COMPLETION_INDEX", "1")
    words = shlex.split(script)
    assert words[:3] == ["exec", "python", "experiments/smaug/pretrain.py"]
    command = parse(get_config, arguments=words[3:])
    spec, processes = JOB["spec"], command.processes
    assert processes.num_processes == spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"  # numbers the pods
    gpus = processes.num_processes * CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    assert command.config.data.batch_size % gpus == 0
    mounts = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert "/dev/shm" in mounts and any(str(command.workdir).startswith(x) for x in mounts)


def test_the_first_pod_has_the_name_of_the_coordinator():
    host = re.search(r"--coordinator (\S+):\d+", CONTAINER["args"][0])[1]
    job, service = JOB["metadata"]["name"], SERVICE["metadata"]["name"]
    assert host == f"{job}-0.{service}" and POD["subdomain"] == service
    assert SERVICE["spec"]["clusterIP"] == "None" and SERVICE["spec"]["publishNotReadyAddresses"]
    assert SERVICE["spec"]["selector"] == {"job-name": job}


def test_a_preempted_run_is_started_again():
    codes = [
        code
        for rule in JOB["spec"]["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", ())
    ]
    assert codes == [PREEMPTED] and POD["restartPolicy"] == "Never"  # as such policies require


def test_the_manifest_fits_the_schema():
    """Of Kubernetes itself, which the package `kubernetes-validate` holds."""
    schema = pytest.importorskip("kubernetes_validate")
    for part in (SERVICE, JOB):
        schema.validate(part, schema.latest_version(), strict=True)
        with pytest.raises(schema.ValidationError):
            schema.validate(part | {"spec": part["spec"] | {"completion": 2}}, "1.31", strict=True)
