"""Classes for `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)` of transformers.

Every export carries this file beside `modeling_vlmae.py`; it is imported only there.
"""

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel

from .modeling_vlmae import VideoLanguageModel, check_sums


class VlmaeConfig(PretrainedConfig):
    """Fields of `config.json`."""

    model_type = "vlmae"


class VlmaeModel(VideoLanguageModel, PreTrainedModel):
    """`VideoLanguageModel` with the loading, saving and casting of transformers."""

    config_class = VlmaeConfig
    main_input_name = "video"

    @classmethod
    def from_pretrained(cls, name, *args, check_files: bool = True, **kwargs):
        """Load from a folder, whose files are compared with `SHA256SUMS`, or from the hub."""
        if check_files and Path(name).is_dir():
            check_sums(Path(name))
        return super().from_pretrained(name, *args, **kwargs)

    def __init__(self, config: VlmaeConfig):
        """Build the model; transformers loads its parameters afterwards."""
        PreTrainedModel.__init__(self, config)
        self.build(config.to_dict())
        self.post_init()
