"""Runs an export on given frames and word ids; needs torch and safetensors, nothing else.

python run_exported.py EXPORT INPUTS.safetensors OUTPUTS.json TOP_K
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

BATCH = 32


def in_batches(run, count: int) -> torch.Tensor:
    """`run` on the rows of each batch; its results in one piece."""
    return torch.cat([run(slice(i, i + BATCH)) for i in range(0, count, BATCH)])


@torch.no_grad()
def run(model, x: dict[str, torch.Tensor], top_k: int) -> dict[str, torch.Tensor]:
    """Everything that the inputs ask for and the checkpoint can do."""
    outputs, count = {}, len(x["ids"])

    def text(rows):
        return model.encode_text(x["ids"][rows], x["mask"][rows])

    def video(rows):
        return model.encode_video(x["video"][rows])

    if hasattr(model, "video_projection"):
        outputs["clips"] = in_batches(
            lambda rows: model.embed_video(video(rows)).mean(dim=1), len(x["video"])
        )
        outputs["texts"] = in_batches(lambda rows: model.embed_text(text(rows)), count)
    if "matched" in x:
        rows, clips = torch.arange(count).repeat_interleave(x["matched"].shape[1]), x["matched"]
        outputs["matches"] = in_batches(
            lambda i: model.match(text(rows[i]), video(clips.flatten()[i])), len(rows)
        )
    if hasattr(model, "classifier") or "answer_ids" in x:
        answers = (x["answer_ids"].long(), x["answer_mask"]) if "answer_ids" in x else None
        outputs["answers"] = in_batches(
            lambda i: model.answer(text(i), video(x["own"][i]), answers, top_k), count
        )
    return outputs


if __name__ == "__main__":
    folder, given, made, top_k = sys.argv[1:]
    sys.path.insert(0, folder)
    from modeling_vlmae import VideoLanguageModel

    model = VideoLanguageModel.from_folder(folder).eval()
    outputs = run(model, load_file(given), int(top_k))
    # Not as safetensors, whose writer needs NumPy.
    Path(made).write_text(json.dumps({name: x.tolist() for name, x in outputs.items()}))
