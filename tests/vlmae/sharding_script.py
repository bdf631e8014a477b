"""Trains and evaluates the tiny experiment on meshes of eight simulated devices; run by a test.

Prints one JSON object: for each mesh the losses of every step, how parameters are cut, and the
retrieval metrics. It is a process of its own because the number of devices is fixed at the start.

python tests/vlmae/sharding_script.py DATA_DIR WORKDIR
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import tiny_experiment
from jaxtyping import PyTree

from data_pipelines.pipeline import EvalData, eval_data, train_batches
from data_pipelines.stored import tokenizer_for
from vlmae.checkpoint import Checkpoints
from vlmae.cli import with_vocabulary
from vlmae.config import ExperimentConfig, MeshConfig
from vlmae.evaluate import evaluate_workdir
from vlmae.evaluators.retrieval import evaluate_retrieval
from vlmae.models.video_language import build_model
from vlmae.sharding import make_mesh, path_name, put_batch, state_shardings
from vlmae.state import TrainState
from vlmae.train import make_checked_mesh, make_init, make_step
from vlmae.workdir import claim_workdir

MESHES = {
    "single": MeshConfig(data=1),
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}
EVALUATED = ("single", "mixed")  # beside the restored run, which is evaluated on data=8
STEPS = 3


def get_config(data_dir: str) -> ExperimentConfig:
    """All four objectives with dropout; a batch of 16, so that every device has two rows."""
    config = tiny_experiment.get_config()
    data = dataclasses.replace(config.data, data_dir=data_dir, batch_size=16, eval_batch_size=8)
    config = dataclasses.replace(config, data=data)
    return with_vocabulary(config, tokenizer_for(config.data))


def shards(state: TrainState) -> dict[str, list[int]]:
    """The part of each array, parameter or moment, that the first device holds."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {path_name(path): list(x.addressable_shards[0].data.shape) for path, x in leaves}


def run(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, data: EvalData | None, workdir: Path
) -> dict:
    """Three steps, the evaluation (if there are data for it) of what came out, a checkpoint."""
    init = make_init(config)
    shardings = state_shardings(jax.eval_shape(init, 0), mesh)
    with jax.set_mesh(mesh), train_batches(config.data, 0, seed=config.seed) as batches:
        state = jax.jit(init, out_shardings=shardings)(config.seed)
        step = make_step(config, mesh, state)
        history = []
        for _ in range(STEPS):
            state, metrics = step(state, put_batch(next(batches), mesh))
            history.append(jax.tree.map(float, jax.device_get(metrics)))
        result = evaluate(config, state.params, mesh, data) if data else {}
        with Checkpoints(workdir) as checkpoints:
            checkpoints.save(STEPS, state)
    params = jax.tree_util.tree_leaves_with_path(jax.device_get(state.params))
    np.savez(workdir / "params.npz", **{path_name(path): x for path, x in params})
    return {"history": history, "shards": shards(state), "retrieval": result}


def evaluate(config: ExperimentConfig, params: PyTree, mesh: jax.sharding.Mesh, data: EvalData):
    """Metrics of VTC over all pairs and VTM over the three best."""
    model = build_model(config)
    return evaluate_retrieval(model, params, data, mesh, batch_size=8, rerank_top_k=3).metrics


def errors(config: ExperimentConfig) -> dict[str, str]:
    """What is said about sizes that eight devices do not divide."""
    data, split = config.data, MeshConfig(data=2, fsdp=4)
    odd_batch = dataclasses.replace(data, batch_size=12)
    odd_eval = dataclasses.replace(data, eval_batch_size=12)
    parts = dataclasses.replace(config.optim, accumulate_steps=4)
    configs = {
        "batch": dataclasses.replace(config, mesh=split, data=odd_batch),
        "eval_batch": dataclasses.replace(config, mesh=split, data=odd_eval),
        "part": dataclasses.replace(config, mesh=split, optim=parts),
        "heads": dataclasses.replace(config, mesh=MeshConfig(tensor=4)),
    }
    said = {}
    for name, wrong in configs.items():
        try:
            make_checked_mesh(wrong)
        except ValueError as error:
            said[name] = str(error)
    return said


def main(data_dir: str, workdir: str) -> None:
    """Runs every mesh."""
    config = get_config(data_dir)
    results = {"errors": errors(config)}
    data = eval_data(config.data)
    for name, sizes in MESHES.items():
        devices = jax.devices()[:1] if name == "single" else jax.devices()
        folder = Path(workdir) / name
        claim_workdir(dataclasses.replace(config, mesh=sizes), folder)
        tokenizer_for(config.data).save(folder / "tokenizer")
        evaluated = data if name in EVALUATED else None
        results[name] = run(config, make_mesh(sizes, devices), evaluated, folder)
    results["restored"] = evaluate_workdir(Path(workdir) / "fsdp", rerank_top_k=3)
    (Path(workdir) / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(*sys.argv[1:])
