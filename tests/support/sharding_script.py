"""Trains and evaluates the tiny experiment on meshes of eight simulated devices; run by a test.

Writes one JSON object: for each mesh the losses of every step, how parameters are cut, and the
retrieval metrics; beside them losses of local scopes, and what is said about wrong sizes. It is a
process of its own because the number of devices is fixed at the start.

python tests/support/sharding_script.py DATA_DIR WORKDIR
"""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np
import tiny_experiment
from helpers import randomize
from jaxtyping import PyTree

from data_pipelines.loading.evaluation import EvalData, eval_data
from data_pipelines.loading.pipeline import train_batches
from data_pipelines.schema.records import Batch
from data_pipelines.storage.stored import tokenizer_for
from vlmae.cli.run_experiment import with_vocabulary
from vlmae.config.experiment import EvaluationConfig, ExperimentConfig, MeshConfig
from vlmae.config.tree import override
from vlmae.evaluation.encode import EvalInputs, encode_clips
from vlmae.evaluation.evaluate import evaluate_workdir
from vlmae.evaluation.retrieval import evaluate_retrieval
from vlmae.models.video_language import build_model
from vlmae.parallel.sharding import (
    batch_shards,
    make_mesh,
    path_name,
    put_batch,
    replicated,
    state_shardings,
)
from vlmae.runs.checkpoint import Checkpoints
from vlmae.runs.inference import EvalContext
from vlmae.runs.workdir import write_run_metadata
from vlmae.training.gradients import make_gradients
from vlmae.training.objectives import compute_losses
from vlmae.training.step import TrainState, make_checked_mesh, make_init, make_step, run_values
from vlmae.training.step_cost import collective_bytes

MESHES = {
    "single": MeshConfig(data=1),
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "mixed": MeshConfig(data=2, fsdp=2, tensor=2),
}
EVALUATED = ("single", "mixed")  # beside the restored run, which is evaluated on data=8
CUT = ("data", "fsdp", "mixed")
STEPS = 3
MULTI = {  # MuLTI's parts, on the meshes of EVALUATED
    "model.fusion.kind": "multiway",
    "model.fusion.sampler.video_latents": 3,
    "model.fusion.sampler.text_latents": 2,
    "model.text.adapter.frozen_blocks": 1,
    "model.text.adapter.width": 8,
    "model.text.max_len": 64,
    "objectives.mcm": 1.0,
    "objectives.mcm_len": 64,
}


def get_config(data_dir: str) -> ExperimentConfig:
    """All four objectives with dropout; a batch of 16, so that every device has two rows.

    Negatives come from the global batch, so that they are the same on every mesh.
    """
    config = override(tiny_experiment.get_config(), {"objectives.vtm_scope": "global"})
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
        step, values = make_step(config, mesh, state), run_values(config)
        history = []
        for _ in range(STEPS):
            state, metrics = step(state, put_batch(next(batches), mesh), values)
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
    context = EvalContext(model, params, mesh, 8)
    clips = encode_clips(context, data, keep_features=True)
    inputs = EvalInputs(data, clips, EvaluationConfig(rerank_top_k=3), config.objectives)
    return evaluate_retrieval(context, inputs).metrics


def scoped_losses(config: ExperimentConfig, mesh: jax.sharding.Mesh, parts: int) -> dict:
    """Metrics of the first batch with random parameters; VTC and VTM stay within `parts` shards."""
    local = {"objectives.vtc_scope": "local", "objectives.vtm_scope": "local"}
    objectives = override(config, local).objectives
    model, init = build_model(config), make_init(config)

    def losses(params: PyTree, batch: Batch) -> dict:
        args = (batch, jax.random.key(0), objectives, parts)
        return model.apply({"params": params}, *args, method=compute_losses).metrics

    with jax.set_mesh(mesh), train_batches(config.data, 0, seed=config.seed) as batches:
        state = jax.jit(init, out_shardings=replicated(mesh))(config.seed)
        params = jax.device_put(randomize(jax.device_get(state.params)), replicated(mesh))
        metrics = jax.jit(losses)(params, put_batch(next(batches), mesh))
        return jax.tree.map(float, jax.device_get(metrics))


def network_bytes(config: ExperimentConfig, mesh: jax.sharding.Mesh, rows: int) -> int:
    """Bytes that each device gets by collectives in a step, negatives within its own rows."""
    changes = {"data.batch_size": rows, "objectives.vtm_scope": "local"}
    config, init = override(config, changes), make_init(config)
    with jax.set_mesh(mesh), train_batches(config.data, 0, seed=0) as batches:
        state, batch = jax.eval_shape(init, 0), put_batch(next(batches), mesh)
        program = make_step(config, mesh, state).lower(state, batch, run_values(config)).compile()
    return sum(collective_bytes(program.as_text()).values())


def parameter_bytes(config: ExperimentConfig) -> int:
    """The size of all parameters."""
    return sum(4 * x.size for x in jax.tree.leaves(jax.eval_shape(make_init(config), 0).params))


def accumulated(config: ExperimentConfig, mesh: jax.sharding.Mesh, shards: int, path: Path) -> dict:
    """Metrics of the first batch in two parts, with dropout and VTC and VTM within `shards` shards.

    The gradients go to an npz file.
    """
    local = {"objectives.vtc_scope": "local", "objectives.vtm_scope": "local"}
    objectives = override(config, local).objectives
    gradients = make_gradients(build_model(config, deterministic=False), objectives, shards, 2)
    init = make_init(config)
    with jax.set_mesh(mesh), train_batches(config.data, 0, seed=config.seed) as batches:
        state = jax.jit(init, out_shardings=replicated(mesh))(config.seed)
        params = jax.device_put(randomize(jax.device_get(state.params)), replicated(mesh))
        batch = put_batch(next(batches), mesh)
        grads, metrics = jax.device_get(jax.jit(gradients)(params, batch, jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    np.savez(path, **{path_name(place): x for place, x in leaves})
    return jax.tree.map(float, metrics)


def errors(config: ExperimentConfig) -> dict[str, str]:
    """Messages about sizes that do not fit eight devices."""
    data, split = config.data, MeshConfig(data=2, fsdp=4)
    odd_batch = dataclasses.replace(data, batch_size=12)
    odd_eval = dataclasses.replace(data, eval_batch_size=12)
    parts = dataclasses.replace(config.optim, accumulate_steps=4)
    one_row = {"objectives.vtm_scope": "local", "data.batch_size": 8}
    configs = {
        "batch": dataclasses.replace(config, mesh=split, data=odd_batch),
        "eval_batch": dataclasses.replace(config, mesh=split, data=odd_eval),
        "part": dataclasses.replace(config, mesh=split, optim=parts),
        "one_row": override(config, one_row),
        "one_row_of_a_part": override(
            config, one_row | {"data.batch_size": 16, "optim.accumulate_steps": 2}
        ),
        "one_row_global": override(config, {"data.batch_size": 8}),
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
        write_run_metadata(dataclasses.replace(config, mesh=sizes), folder)
        tokenizer_for(config.data).save(folder / "tokenizer")
        evaluated = data if name in EVALUATED else None
        results[name] = run(config, make_mesh(sizes, devices), evaluated, folder)
    single, cut = make_mesh(MESHES["single"], jax.devices()[:1]), make_mesh(MESHES["data"])
    results["scopes"] = {
        "devices": scoped_losses(config, cut, batch_shards(cut)),
        "shards": scoped_losses(config, single, 8),
        "whole": scoped_losses(config, single, 1),
        "two_groups": scoped_losses(config, single, 2),
        "two_groups_on_devices": scoped_losses(config, cut, 2),
    }
    cut_in_two = make_mesh(MeshConfig(data=2), jax.devices()[:2])
    results["accumulated"] = {
        name: accumulated(config, mesh, 2, Path(workdir) / f"accumulated_{name}.npz")
        for name, mesh in (("single", single), ("cut", cut_in_two))
    }
    multi = with_vocabulary(override(config, MULTI), tokenizer_for(config.data))
    for name, mesh in (("single", single), ("mixed", make_mesh(MESHES["mixed"]))):
        folder = Path(workdir) / f"multi_{name}"
        folder.mkdir()
        results[f"multi_{name}"] = run(multi, mesh, None, folder)
    results["batch_shards"] = {name: batch_shards(make_mesh(MESHES[name])) for name in CUT}
    [results["restored"]] = evaluate_workdir(Path(workdir) / "fsdp", rerank_top_k=3).values()
    cut = make_mesh(MESHES["fsdp"])
    results["network"] = {rows: network_bytes(config, cut, rows) for rows in (16, 64)}
    results["parameter_bytes"] = parameter_bytes(config)
    (Path(workdir) / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main(*sys.argv[1:])
