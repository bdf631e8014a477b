"""Devices are named at the start, and GPUs that were asked for are not replaced in silence."""

import os

import jax
import pytest

from data_pipelines.schema.checks import UserError
from vlmae.cli import run_experiment
from vlmae.config.experiment import ExperimentConfig
from vlmae.parallel import devices, gpu_settings
from vlmae.parallel.devices import check_gpus, describe_devices


class FreeChoice:
    """As much of jax as `check_gpus` reads."""

    class config:
        jax_platforms = None

    @staticmethod
    def default_backend() -> str:
        return "cpu"


@pytest.fixture
def free_choice(monkeypatch):
    monkeypatch.setattr(devices, "jax", FreeChoice)


@pytest.mark.parametrize(
    "given", [{"SLURM_JOB_GPUS": "0,1"}, {"CUDA_VISIBLE_DEVICES": "0"}, {"SLURM_STEP_GPUS": "3"}]
)
def test_a_process_with_gpus_does_not_train_on_the_cpu(given, free_choice):
    [(name, value)] = given.items()
    with pytest.raises(ValueError, match=rf"given GPUs \({name}={value}\), but jax finds the CPU"):
        check_gpus(given)


@pytest.mark.parametrize("given", [{}, {"CUDA_VISIBLE_DEVICES": ""}, {"SLURM_JOB_GPUS": ""}])
def test_without_gpus_it_does(given, free_choice):
    check_gpus(given)


def test_the_cpu_can_be_asked_for():
    assert jax.config.jax_platforms == "cpu"
    check_gpus({"CUDA_VISIBLE_DEVICES": "0"})


def test_devices_are_named(monkeypatch):
    count = jax.device_count()
    assert describe_devices() == f"{count} x {jax.devices()[0].device_kind}"
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert describe_devices().endswith("in 2 processes")


def test_a_run_names_them_first(monkeypatch, capsys, tmp_path):
    def stop(config):
        raise UserError("stop")

    monkeypatch.setattr(run_experiment, "resolve", stop)
    with pytest.raises(UserError, match="stop"):
        run_experiment.run_experiment(ExperimentConfig(), tmp_path)
    assert capsys.readouterr().out == f"devices: {describe_devices()}\n"


@pytest.mark.parametrize("given", [None, "0.5"])
@pytest.mark.parametrize("accelerator", [True, False])
def test_a_run_takes_nine_tenths_of_a_gpu_unless_told_otherwise(given, accelerator, monkeypatch):
    monkeypatch.setattr(gpu_settings, "may_have_accelerator", lambda: accelerator)
    monkeypatch.setattr(os, "environ", {gpu_settings.MEMORY_FRACTION: given} if given else {})
    gpu_settings.take_gpu_memory()
    wanted = given or ("0.9" if accelerator else None)
    assert gpu_settings.recorded_settings().get(gpu_settings.MEMORY_FRACTION) == wanted
    assert gpu_settings.memory_fraction() == float(given or 0.9)
