"""Retrieval with scoring again by one, two and four processes: equal results, divided memory.

    python -m experiments.benchmarks.evaluation_processes

A small model with random parameters and made-up clips; each process has one CPU device. Memory is
that of the clips' features in a process. Bytes to the host are those of all results that a process
copies from its device; with several processes, all but its own part has crossed the network.
"""

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

from experiments.benchmarks.report import print_report, write_report
from vlmae.runs.tables import markdown_table

BATCH, FRAMES, IMAGE, LENGTH = 32, 8, 32, 8
CHANGES = {
    "data.image_size": IMAGE,
    "data.text_len": LENGTH,
    "data.eval_batch_size": BATCH,
    "model.video.width": 128,
    "model.video.depth": 1,
    "model.video.num_heads": 2,
    "model.video.mlp_dim": 128,
    "model.video.patch_size": 8,
    "model.text.vocab_size": 100,
    "model.text.width": 128,
    "model.text.depth": 1,
    "model.text.num_heads": 2,
    "model.text.mlp_dim": 128,
    "model.fusion.depth": 1,
    "model.dtype": "float32",
    "objectives.mlm": 0.0,
    "objectives.mvm": 0.0,
}


def made_up_data(clips: int):
    """Make an evaluation split of noise, one caption a clip, in batches of BATCH."""
    import numpy as np

    from data_pipelines.loading.evaluation import EvalData
    from data_pipelines.schema.records import Batch, Texts

    rows = np.arange(clips, dtype=np.int32)
    ids = np.random.default_rng(0).integers(5, 100, (clips, LENGTH), np.int32)
    texts = Texts(ids, np.ones(ids.shape, bool), rows, rows, tuple(map(str, rows)))

    class MadeUp(EvalData):
        """Clips that follow from their numbers."""

        def batches(self, part: int = 0, parts: int = 1) -> Iterator[Batch]:
            """Yield a part of each batch."""
            each = BATCH // parts
            for start in range(0, clips, BATCH):  # every part has a share of the last batch
                own = np.arange(start, start + each, dtype=np.int32) + part * each
                noise = [
                    np.random.default_rng(int(i)).integers(
                        0, 256, (FRAMES, IMAGE, IMAGE, 3), np.uint8
                    )
                    for i in own
                ]
                valid = own < clips
                yield Batch(np.stack(noise), ids[:each], ids[:each] > 0, own, valid)

    return MadeUp(clips, rows, tuple(map(str, rows)), texts, *[None] * 5)


def work(clips: int, top_k: int) -> dict[str, Any]:
    """Evaluate in this process, together with the others; return metrics and costs."""
    import jax

    from vlmae.config.experiment import EvaluationConfig, ExperimentConfig, MeshConfig
    from vlmae.config.tree import override
    from vlmae.evaluation.encode import EvalInputs, encode_clips
    from vlmae.evaluation.retrieval import evaluate_retrieval
    from vlmae.models.video_language import build_model
    from vlmae.parallel.sharding import make_mesh, replicated
    from vlmae.runs.inference import EvalContext
    from vlmae.training.step import make_init

    fetched, get = 0, jax.device_get

    def device_get(tree: Any) -> Any:
        nonlocal fetched
        found = get(tree)
        fetched += sum(x.nbytes for x in jax.tree.leaves(found))
        return found

    jax.device_get = device_get
    config, mesh = override(ExperimentConfig(), CHANGES), make_mesh(MeshConfig())
    data = made_up_data(clips)
    with jax.set_mesh(mesh):
        params = jax.jit(make_init(config), out_shardings=replicated(mesh))(0).params
        context = EvalContext(build_model(config), params, mesh, BATCH)
        encoded = encode_clips(context, data, keep_features=True)
        evaluation = EvaluationConfig(rerank_top_k=top_k)
        inputs = EvalInputs(data, encoded, evaluation, config.objectives)
        metrics = evaluate_retrieval(context, inputs).metrics
    spent = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "metrics": metrics,
        "features_mib": held_bytes(encoded.features) / 2**20,
        "to_host_mib": fetched / 2**20,
        "cpu_seconds": spent.ru_utime + spent.ru_stime,
        "peak_mib": spent.ru_maxrss / 2**10,
    }


def held_bytes(features: Any) -> int:
    """Sum the bytes of the features that this process holds."""
    import jax

    trees = [load() for load in features.batches] if hasattr(features, "batches") else [features]
    leaves = jax.tree.leaves(trees)
    return sum(
        sum(part.data.nbytes for part in x.addressable_shards)
        if isinstance(x, jax.Array)
        else x.nbytes
        for x in leaves
    )


def run_processes(count: int, clips: int, top_k: int) -> list[dict[str, Any]]:
    """Run the evaluation by some processes of this machine; return what each reports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # NPROC: on few cores, processes with gloo wait for each other forever without more threads.
    env = os.environ | {"NPROC": "16", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "experiments.benchmarks.evaluation_processes"]
    command += ["--clips", str(clips), "--top-k", str(top_k)]
    running = [
        subprocess.Popen(
            [*command, "--worker", address, str(i), str(count)],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"exit codes {[process.returncode for process in running]}")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def format_rows(found: dict[int, list[dict[str, Any]]]) -> str:
    """Format a row for each number of processes, with the largest value of any of them."""
    heads = {
        "features_mib": "features, MiB",
        "to_host_mib": "to the host, MiB",
        "cpu_seconds": "CPU seconds",
        "peak_mib": "peak memory, MiB",
    }
    rows = [["processes", *heads.values(), "largest difference of a metric"]]
    for count, results in found.items():
        cells = [f"{max(x[name] for x in results):.1f}" for name in heads]
        rows.append([count, *cells, f"{largest_difference(results, found[1][0]):.0e}"])
    return markdown_table(rows)


def largest_difference(results: list[dict[str, Any]], base: dict[str, Any]) -> float:
    """Compute the largest difference of a metric from its value in `base`, as a fraction of it.

    Temperatures are left out: a random model fits any high one equally well.
    """
    return max(
        abs(result["metrics"][name] - value) / max(abs(value), 1e-9)
        for result in results
        for name, value in base["metrics"].items()
        if not name.endswith("temperature")
    )


def main(
    clips: int = 1024,
    top_k: int = 2,
    processes: tuple[int, ...] = (1, 2, 4),
    worker: tuple[str, int, int] | None = None,
    out_dir: Path | None = None,
) -> None:
    """Measure and print.

    Args:
      clips: of the split.
      top_k: candidates of each query that are scored again.
      processes: numbers of processes, 1 first.
      worker: address, number and count of processes, for one of them.
      out_dir: where to write the JSON and the table.
    """
    if worker:
        import jax

        address, number, count = worker
        if count > 1:
            jax.distributed.initialize(address, count, number)
        print(json.dumps(work(clips, top_k)))
        return
    found = {count: run_processes(count, clips, top_k) for count in processes}
    table, settings = format_rows(found), {"clips": clips, "top_k": top_k}
    print_report(table, settings)
    if out_dir:
        write_report(out_dir, "evaluation_processes", table, settings, processes=found)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
