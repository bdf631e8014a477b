"""Builders of all data sets, by name; imported only when wanted."""

import importlib

from data_pipelines.storage.builders.base import VideoTextBuilder

# name -> "module:class"
PUBLISHED = {
    "msrvtt_9k": "data_pipelines.storage.builders.msrvtt:Msrvtt9k",
    "msrvtt_7k": "data_pipelines.storage.builders.msrvtt:Msrvtt7k",
    "msrvtt_qa": "data_pipelines.storage.builders.msrvtt:MsrvttQA",
    "msrvtt_mc": "data_pipelines.storage.builders.msrvtt:MsrvttMC",
    "msvd": "data_pipelines.storage.builders.msvd:Msvd",
    "msvd_qa": "data_pipelines.storage.builders.msvd:MsvdQA",
    "tgif_action": "data_pipelines.storage.builders.tgif:TgifAction",
    "tgif_transition": "data_pipelines.storage.builders.tgif:TgifTransition",
    "tgif_frame": "data_pipelines.storage.builders.tgif:TgifFrame",
    "didemo": "data_pipelines.storage.builders.didemo:Didemo",
    "activitynet": "data_pipelines.storage.builders.activitynet:ActivityNet",
    "activitynet_qa": "data_pipelines.storage.builders.activitynet:ActivityNetQA",
    "ssv2_label": "data_pipelines.storage.builders.ssv2:Ssv2Label",
    "ssv2_template": "data_pipelines.storage.builders.ssv2:Ssv2Template",
    "lsmdc": "data_pipelines.storage.builders.lsmdc:Lsmdc",
    "hvu": "data_pipelines.storage.builders.hvu:Hvu",
    "webvid_2m": "data_pipelines.storage.builders.web:WebVid2M",
    "webvid_10m": "data_pipelines.storage.builders.web:WebVid10M",
    "cc3m": "data_pipelines.storage.builders.web:CC3M",
    "cc12m": "data_pipelines.storage.builders.web:CC12M",
    "sbu": "data_pipelines.storage.builders.web:Sbu",
    "coco": "data_pipelines.storage.builders.images:Coco",
    "visual_genome": "data_pipelines.storage.builders.images:VisualGenome",
}
BUILDERS = {
    "shapes": "data_pipelines.storage.builders.shapes:Shapes",
    "shapes_3": "data_pipelines.storage.builders.shapes:Shapes3",
    "emojivid": "data_pipelines.storage.builders.emojivid:EmojiVid",
    "easy_vqa": "data_pipelines.storage.builders.easy_vqa:EasyVqa",
    "manifest": "data_pipelines.storage.builders.manifest:Manifest",
    "folder": "data_pipelines.storage.builders.folder:Folder",
    "annotations": "data_pipelines.storage.builders.annotation_files:Annotations",
    "webdataset": "data_pipelines.storage.builders.webdataset:WebDataset",
    "parquet": "data_pipelines.storage.builders.parquet:Parquet",
} | PUBLISHED


def builder_class(name: str) -> type[VideoTextBuilder]:
    """Import the class of a key of `BUILDERS`."""
    module, _, class_name = BUILDERS[name].partition(":")
    return getattr(importlib.import_module(module), class_name)
