"""A model's facts from its config.json and safetensors headers: nothing is loaded, torch is not imported.

What is read here was written by strangers: every size has bounds, every file is looked at before it is believed, and a
model that would bring code of its own is refused unless the user named it.

`model` reads, `files` finds what a model is made of, `refusals` says which configs are not taken, `agreement` compares
config, weights and tokenizer.
"""

from planner.reading.agreement import LONGEST_TOKENIZER_BYTES, check_complete
from planner.reading.files import check_finite
from planner.reading.model import ReadResult, read_model

__all__ = ["LONGEST_TOKENIZER_BYTES", "ReadResult", "check_complete", "check_finite", "read_model"]
