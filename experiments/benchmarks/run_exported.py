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


def repeat(features, count: int):
    """Repeat the features of one clip."""
    if isinstance(features, torch.Tensor):
        return features.expand(count, *features.shape[1:])
    parts = [repeat(part, count) for part in features]
    return type(features)(*parts) if hasattr(features, "_fields") else tuple(parts)


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
        clips = x["matched"].flatten()
        rows = torch.arange(count).repeat_interleave(x["matched"].shape[1])
        outputs["matches"] = torch.zeros(len(clips))
        for clip in range(len(x["video"])):  # encoded once, and matched with all of its texts
            features, pairs = video([clip]), (clips == clip).nonzero()[:, 0]
            for i in pairs.split(BATCH):
                outputs["matches"][i] = model.match(repeat(features, len(i)), text(rows[i]))
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
