"""Run an export on given frames and token ids; needs torch and safetensors, nothing else.

python run_exported.py EXPORT INPUTS.safetensors OUTPUTS.json TOP_K
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

BATCH = 32


def in_batches(run, count: int) -> torch.Tensor:
    """Apply `run` to the rows of each batch, and concatenate the results."""
    return torch.cat([run(slice(i, i + BATCH)) for i in range(0, count, BATCH)])


@torch.no_grad()
def run(model, x: dict[str, torch.Tensor], top_k: int) -> dict[str, torch.Tensor]:
    """Compute every output that the inputs ask for and the checkpoint has parts for."""
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
            lambda i: model.match(video(clips.flatten()[i]), text(rows[i])), len(rows)
        )
    if hasattr(model, "classifier") or "answer_ids" in x:
        answers = (x["answer_ids"].long(), x["answer_mask"]) if "answer_ids" in x else None
        outputs["answers"] = in_batches(
            lambda i: model.answer(video(x["own"][i]), text(i), answers, top_k), count
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
