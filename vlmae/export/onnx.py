"""ONNX programs of a trained model, written by torch and checked in onnxruntime.

Each file is one of the `programs`: it holds its parameters and takes any batch size. Needs the
extra `onnx`.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from data_pipelines.schema.checks import UserError, first_line
from vlmae.export import programs
from vlmae.export.folders import Checkpoint
from vlmae.export.modeling_vlmae import TextFeatures, VideoFeatures, VideoLanguageModel
from vlmae.export.programs import Arrays, Program, check_program
from vlmae.weights.export_format import describe
from vlmae.weights.torch_names import to_torch


def encode_video(model: VideoLanguageModel, video: Tensor) -> dict[str, Tensor]:
    """Repeat `programs.encode_video` in torch, as the functions below repeat theirs."""
    features = model.encode_video(video)
    outputs = {"tokens": features.tokens, "frame_cls": features.frame_cls}
    if "video_projection" in model.parts:
        outputs["embedding"] = model.embed_video(features).mean(dim=1)
    return outputs


def encode_text(model: VideoLanguageModel, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Encode token ids [b l], with a mask that is True on real tokens, to tokens and a vector."""
    text = model.encode_text(ids, mask)
    outputs = {"tokens": text.tokens}
    if "text_projection" in model.parts:
        outputs["embedding"] = model.embed_text(text)
    return outputs


def match(model: VideoLanguageModel, **inputs: Tensor) -> dict[str, Tensor]:
    """Score text i with clip i: the logit of a match minus that of no match."""
    return {"scores": model.match(*_features(inputs))}


def classify(model: VideoLanguageModel, **inputs: Tensor) -> dict[str, Tensor]:
    """Score all answers or labels, as logits [b c]."""
    return {"logits": model.answer(*_features(inputs))}


def score_answers(
    model: VideoLanguageModel, answer_ids: Tensor, answer_mask: Tensor, **inputs: Tensor
) -> dict[str, Tensor]:
    """Score answer i, [CLS] words [SEP], to question i about clip i by its log-probability."""
    video, text = _features(inputs)
    fused = model.fuse(video, text)
    return {"log_probs": model.answer_log_probs(answer_ids.long(), answer_mask, text, fused)}


# By function and not by name: a program without a torch version fails here.
METHODS: dict[Callable, Callable] = {  # of the Flax model -> of the PyTorch module
    programs.encode_video: encode_video,
    programs.encode_text: encode_text,
    programs.match: match,
    programs.classify: classify,
    programs.score_answers: score_answers,
}


def write_onnx(found: dict[str, Program], checkpoint: Checkpoint, folder: Path) -> None:
    """Write `NAME.onnx` for each program and run it in onnxruntime on random input.

    Args:
      found: the programs of the model.
      checkpoint: gives config and parameters.
      folder: where to write.

    Raises:
      UserError: a program cannot be written, or does not give the PyTorch module's outputs with
        two and with three rows: says which and why.
    """
    _, config, params, step = checkpoint
    model = VideoLanguageModel(describe(config, params, step)).eval()
    tensors = {name: torch.tensor(np.asarray(x)) for name, x in to_torch(params).items()}
    # Strict: a parameter that is missing would export noise.
    model.load_state_dict(tensors)
    for name, program in found.items():
        write_program(TorchProgram(model, program), program, folder / f"{name}.onnx")


class TorchProgram(nn.Module):
    """A program as a module with positional inputs and outputs, as torch's exporter wants them."""

    def __init__(self, model: VideoLanguageModel, program: Program):
        """Look up the torch version of the program's method."""
        super().__init__()
        self.model, self.method = model, METHODS[program.method]
        self.inputs, self.outputs = tuple(program.inputs), tuple(program.outputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run the program on its inputs in the order of `inputs`."""
        found = self.method(self.model, **dict(zip(self.inputs, inputs, strict=True)))
        return tuple(found[name] for name in self.outputs)


def write_program(module: TorchProgram, program: Program, path: Path) -> None:
    """Write one file and compare its outputs in onnxruntime with the module's.

    Raises:
      UserError: ONNX lacks an operator of it, or its outputs differ.
    """
    import onnxruntime

    try:
        save_program(module, program, path)
    # Only what ONNX cannot express: another format can. Any other error here is ours, and keeps its
    # traceback.
    except torch.onnx.OnnxExporterError as error:
        why = first_line(error)
        message = f"ONNX has no {path.stem} with parity: nothing is written: {why}"
        raise UserError(message) from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    @torch.no_grad()
    def run(given: Arrays) -> Arrays:
        found = module(*(torch.tensor(given[name]) for name in module.inputs))
        return {name: x.numpy() for name, x in zip(module.outputs, found, strict=True)}

    def run_file(given: Arrays) -> Arrays:
        found = session.run(module.outputs, given)
        return dict(zip(module.outputs, found, strict=True))

    try:
        check_program(path.stem, run, run_file, program.inputs)
    except UserError as error:
        raise UserError(f"ONNX has no parity: nothing is written: {error}") from error


def save_program(module: TorchProgram, program: Program, path: Path) -> None:
    """Write one file by torch's exporter, without the paths of this machine."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass, NameFixPass

    sample = tuple(_zeros(x) for x in program.inputs.values())
    batch = torch.export.Dim("b")
    # PyTorch's fused attention is traced with a memory layout of its own, which the exporter cannot
    # decompose into operators of ONNX; the plain version can be.
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
    NameFixPass()(exported.model)  # torch may give an inner value the name of an output
    exported.save(path)


def _features(inputs: dict[str, Tensor]) -> tuple[VideoFeatures, TextFeatures]:
    """Rebuild the features of both encoders; patch ids are dropped, since no fusion reads them."""
    tokens = inputs["video_tokens"]
    patch_ids = tokens.new_zeros(tokens.shape[:3], dtype=torch.int64)
    video = VideoFeatures(tokens, inputs["frame_cls"], (patch_ids,), patch_ids.bool())
    return video, TextFeatures(inputs["text_tokens"], inputs["text_mask"])


def _zeros(x: jax.ShapeDtypeStruct) -> Tensor:
    """Make an example input of two rows: the exporter takes a size of one for a constant."""
    return torch.zeros(2, *x.shape[1:], dtype=getattr(torch, str(x.dtype)))
