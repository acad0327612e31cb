"""The model `xlformer` of lm-evaluation-harness: its form around an Answerer."""

from __future__ import annotations

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from xlformer.errors import UserError
from xlformer.harness.answerer import Answerer


@register_model("xlformer")
class XLFormer(LM):
    """A run; the arguments are those of `Answerer.open`.

    The program adds a device, cuda:0 if nothing was said, and max_batch_size. Neither
    has a meaning here: JAX takes the devices that it finds, and no size is tried out.
    """

    def __init__(self, *, device=None, max_batch_size=None, **arguments):
        super().__init__()
        del device, max_batch_size
        self.answerer = Answerer.open(**arguments)

    @classmethod
    def create_from_arg_obj(cls, arg_dict, additional_config=None):
        """Of --model_args and the program's own, which give way."""
        given = {k: v for k, v in (additional_config or {}).items() if v is not None}
        return cls(**given | arg_dict)

    def loglikelihood(self, requests, disable_tqdm: bool = False):
        del disable_tqdm
        return self.answerer.loglikelihood(requests)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False):
        del disable_tqdm
        return self.answerer.loglikelihood_rolling(requests)

    def generate_until(self, requests, disable_tqdm: bool = False):
        del disable_tqdm
        return self.answerer.generate_until(requests)

    def tok_encode(self, string: str, **options) -> list[int]:
        """The ids of a text; there are no special tokens to add."""
        del options
        return self.answerer.tok_encode(string)

    def chat_template(self, chat_template=False) -> str:
        if chat_template:
            raise UserError("a run of xlformer has no chat template to apply")
        return ""

    def get_model_info(self) -> dict:
        """What the results say of the model."""
        return self.answerer.info()
