"""A trained model as ONNX files, for onnxruntime and whatever else reads them.

Each file is one of the `programs`: it holds its parameters, takes any batch size and, for clips,
uint8 frames. Needs the extra `onnx`.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
from jaxtyping import PyTree
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmae.config import ExperimentConfig
from vlmae.interop import programs
from vlmae.interop.exported import describe
from vlmae.interop.programs import Arrays, Program, check_program
from vlmae.interop.torch_model import TextFeatures, VideoFeatures, VideoLanguageModel
from vlmae.interop.torch_names import to_torch


def encode_video(model: VideoLanguageModel, video: Tensor) -> dict[str, Tensor]:
    """As `programs.encode_video`, and so on for those below."""
    features = model.encode_video(video)
    outputs = {"tokens": features.tokens, "frame_cls": features.frame_cls}
    if "video_projection" in model.parts:
        outputs["embedding"] = model.embed_video(features).mean(dim=1)
    return outputs


def encode_text(model: VideoLanguageModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Tokens of word ids [b l], and a unit vector; the mask is True on real words."""
    text = model.encode_text(ids, mask)
    outputs = {"tokens": text.tokens}
    if "text_projection" in model.parts:
        outputs["embedding"] = model.embed_text(text)
    return outputs


def match(model: VideoLanguageModel, **inputs: Tensor) -> dict[str, Tensor]:
    """The logit of a match less that of none, of text i with clip i."""
    return {"scores": model.match(*_features(inputs))}


def classify(model: VideoLanguageModel, **inputs: Tensor) -> dict[str, Tensor]:
    """Logits of the answers or labels."""
    return {"logits": model.answer(*_features(inputs))}


def score_answers(
    model: VideoLanguageModel, answer_ids: Tensor, answer_mask: Tensor, **inputs: Tensor
) -> dict[str, Tensor]:
    """The log-probability of answer i, [CLS] words [SEP], to question i about clip i."""
    text, video = _features(inputs)
    fused = model.fuse(text, video)
    return {"log_probs": model.answer_log_probs(answer_ids.long(), answer_mask, text, fused)}


METHODS: dict[Callable, Callable] = {
    programs.encode_video: encode_video,
    programs.encode_text: encode_text,
    programs.match: match,
    programs.classify: classify,
    programs.score_answers: score_answers,
}


def write_onnx(
    found: dict[str, Program], config: ExperimentConfig, params: PyTree, step: int, folder: Path
) -> None:
    """Writes `NAME.onnx` for each program, which is then run in onnxruntime on random input.

    Args:
      found: the programs of the model.
      config: of the run.
      params: of the model.
      step: of the checkpoint.
      folder: where to write.

    Raises:
      ValueError: a program cannot be written, or does not give what the PyTorch module gives with
        two and with three rows: says which and why.
    """
    model = VideoLanguageModel(describe(config, params, step)).eval()
    tensors = {name: torch.tensor(np.asarray(x)) for name, x in to_torch(params).items()}
    model.load_state_dict(tensors)
    for name, program in found.items():
        write_program(TorchProgram(model, program), program, folder / f"{name}.onnx")


class TorchProgram(nn.Module):
    """A program of the PyTorch module, over its arrays in the order of their names."""

    def __init__(self, model: VideoLanguageModel, program: Program):
        super().__init__()
        self.model, self.method = model, METHODS[program.method]
        self.inputs, self.outputs = tuple(program.inputs), tuple(program.outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in the order of their names."""
        found = self.method(self.model, **dict(zip(self.inputs, inputs, strict=True)))
        return tuple(found[name] for name in self.outputs)


def write_program(module: TorchProgram, program: Program, path: Path) -> None:
    """Writes one file and compares what onnxruntime makes of it with the module.

    Raises:
      ValueError: it cannot be written or run, or gives something else.
    """
    import onnxruntime

    try:
        save_program(module, program, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # those of onnxruntime have no class in common
        why = str(error).strip().splitlines()[0]
        message = f"ONNX has no {path.stem} with parity: nothing is written: {why}"
        raise ValueError(message) from error

    @torch.no_grad()
    def run(given: Arrays) -> Arrays:
        found = module(*(torch.tensor(given[name]) for name in module.inputs))
        return {name: x.numpy() for name, x in zip(module.outputs, found, strict=True)}

    def run_file(given: Arrays) -> Arrays:
        found = session.run(module.outputs, given)
        return dict(zip(module.outputs, found, strict=True))

    try:
        check_program(path.stem, run, run_file, program.inputs)
    except ValueError as error:
        raise ValueError(f"ONNX has no parity: nothing is written: {error}") from error


def save_program(module: TorchProgram, program: Program, path: Path) -> None:
    """Writes one file by torch's exporter, without what tells of the machine that wrote it."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, NameFixPass

    sample = tuple(_zeros(x) for x in program.inputs.values())
    batch = torch.export.Dim("b")
    # PyTorch's fused attention lays out its result as no other version does, and what is traced
    # with it cannot be broken down into operators of ONNX.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings(action="ignore"):
        exported = torch.onnx.export(
            module,
            sample,
            input_names=module.inputs,
            output_names=module.outputs,
            dynamic_shapes=(tuple({0: batch} for _ in sample),),
            dynamo=True,
            verbose=False,
        )
    ClearMetadataAndDocStringPass()(exported.model)
    NameFixPass()(exported.model)  # torch may name a value within as an output is named
    exported.save(path)


def _features(inputs: dict[str, Tensor]) -> tuple[TextFeatures, VideoFeatures]:
    """What the fusion reads of both; where tokens stood does not matter to it."""
    tokens = inputs["video_tokens"]
    nowhere = tokens.new_zeros(tokens.shape[:3], dtype=torch.int64)
    video = VideoFeatures(tokens, inputs["frame_cls"], (nowhere,), nowhere.bool())
    return TextFeatures(inputs["text_tokens"], inputs["text_mask"]), video


def _zeros(x: jax.ShapeDtypeStruct) -> Tensor:
    """An example of an input, of two rows: one row would be taken for a constant."""
    return torch.zeros(2, *x.shape[1:], dtype=getattr(torch, str(x.dtype)))
