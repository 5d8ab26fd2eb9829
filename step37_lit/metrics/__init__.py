"""Caption metrics as COCO defines them: BLEU-1..4, ROUGE-L and CIDEr-D as `torchmetrics.Metric`, and the tokenizer."""

from step37_lit.metrics.bleu import CocoBLEU
from step37_lit.metrics.cider import CIDErD
from step37_lit.metrics.frequencies import DocumentFrequencies
from step37_lit.metrics.ptb import ptb_tokenize
from step37_lit.metrics.rouge import CocoROUGEL

__all__ = ["CIDErD", "CocoBLEU", "CocoROUGEL", "DocumentFrequencies", "ptb_tokenize"]
