"""data: from a user's file to token ids and a mask of what is learnt.

file ──sources──▶ rows ──schema──▶ messages ──chat──▶ text ──spans──▶ places ──encode──▶ ids + mask ──batch──▶ tensors
flags and dataset say which rows, and do the splitting and merging between rows and messages.
"""

from .batch import Batch, collate, collate_packed
from .chat import Message, Tokenizer, render, template_of
from .dataset import Dataset, read_datasets
from .encode import (
    LEARN,
    LEGEND,
    Encoded,
    EncodedDataset,
    EncodeReport,
    Learn,
    encode_dataset,
    encode_messages,
    encode_prompt,
    show,
)
from .flags import DataFlags
from .formats import FORMATS, chat_template, format_name
from .order import DataOrder, epoch_order, step_rows
from .packing import pack
from .preference import EncodedPair, Pair, encode_pairs, to_pair
from .schema import Schema, detect, to_messages
from .sources import read_rows

__all__ = [
    "FORMATS",
    "LEARN",
    "LEGEND",
    "Batch",
    "DataFlags",
    "DataOrder",
    "Dataset",
    "EncodeReport",
    "Encoded",
    "EncodedDataset",
    "EncodedPair",
    "Learn",
    "Message",
    "Pair",
    "Schema",
    "Tokenizer",
    "chat_template",
    "collate",
    "collate_packed",
    "detect",
    "encode_dataset",
    "encode_messages",
    "encode_pairs",
    "encode_prompt",
    "epoch_order",
    "format_name",
    "pack",
    "read_datasets",
    "read_rows",
    "render",
    "show",
    "step_rows",
    "template_of",
    "to_messages",
    "to_pair",
]
